"""The ExpertMLP node as one ``IPluginV3`` in Python, for TensorRT-RTX and standard TensorRT.

The ONNX parser makes it from the node; ``enqueue`` launches the compiled dispatch, gate_up, down and combine
through the CUDA driver. Neither library is imported here: :func:`register` is given the module to use. Where
engines with the plugin run, they need this package, ``cuda-bindings`` and their bundle's compiled kernels.

*Not run on a GPU*: engines with it are built by the real TensorRT-RTX, and its launches are run by Triton's
interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_export.errors import MoeExportError, UsageError
from moe_export.ops import DOMAIN, OPS

from .driver import Launcher
from .experts import ExpertShape, TileSet, scratch_bytes, tile_sets
from .launching import Kernels, run
from .library import KernelLibrary

NAME, NAMESPACE, VERSION = "ExpertMLP", DOMAIN, "1"
BY_TOKENS = 1
"""The tactic that chooses tiles by the number of tokens in each call. The following ones are fixed sets. It
comes first, since a builder without a GPU times nothing."""


def register(
    trt: Any, library: KernelLibrary | Path | str | None = None, launcher: Launcher | None = None
) -> Any:
    """Make the plugin known to ``trt`` (``tensorrt_rtx`` or ``tensorrt``), before parsing or loading an
    engine. Returns the plugin's creator.

    ``library``: compiled kernels, or their folder. A build without a GPU needs none; running does. Calling
    again adds a bundle's kernels. ``launcher``: the CUDA driver unless given.

    Raises:
        BundleError: the folder's kernels are missing or damaged.
        UsageError: another plugin of this name is registered.
    """
    if isinstance(library, (str, Path)):
        library = KernelLibrary.load(Path(library))
    creator = _CREATORS.get(trt.__name__)
    if creator is None:
        creator = _classes(trt)(Kernels(library, launcher))
        if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
            raise UsageError(
                f"{trt.__name__}: a plugin {NAMESPACE}::{NAME} version {VERSION} is registered already"
            )
        _CREATORS[trt.__name__] = creator
    elif library is not None or launcher is not None:
        creator.kernels.add(library, launcher)
    return creator


_CREATORS: dict[str, Any] = {}
"""By module name; the registry keeps no reference that keeps a Python object alive."""


def problems() -> tuple[str, ...]:
    """What plugins refused in this process, one line each: TensorRT itself only says that a plugin failed."""
    return tuple(_PROBLEMS)


_PROBLEMS: list[str] = []


def _reported(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, which leaves its refusals in :func:`problems`."""

    @functools.wraps(method)
    def called(*given: Any) -> Any:
        try:
            return method(*given)
        except MoeExportError as error:
            if str(error) not in _PROBLEMS:
                _PROBLEMS.append(str(error))
            raise

    return called


def decode_fields(fields: Sequence[Any]) -> dict[str, Any]:
    """Attributes and sizes from a plugin field collection.

    Raises:
        UsageError: a field of another kind than the op's attribute.
    """
    kinds = {a.name: a.kind for a in OPS[NAME].attributes}
    out: dict[str, Any] = {}
    for field in fields:
        kind = kinds.get(field.name)
        if kind is None:
            continue
        if kind is str:
            # Text from ONNX ends in a NUL.
            out[field.name] = bytes(field.data).rstrip(b"\0").decode()
        elif len(field.data) != 1:
            raise UsageError(f"plugin {NAME}: field {field.name}: expected one number, got {len(field.data)}")
        else:
            out[field.name] = kind(field.data[0])
    return out


def _input_names(count: int) -> tuple[str, ...]:
    names = tuple(p.name for p in OPS[NAME].inputs)
    if count not in (len(names) - 2, len(names)):
        raise UsageError(
            f"plugin {NAME}: {count} inputs; expected {len(names) - 2}, or {len(names)} with biases"
        )
    return names[:count]


def _make_shape(trt: Any, attributes: Mapping[str, Any], inputs: Sequence[Any]) -> ExpertShape:
    """The compiled-in facts from attributes and the inputs' descriptors (``dims``, ``type``).

    Raises:
        UsageError: sizes that are dynamic or do not fit together.
    """
    dims = {n: tuple(d.dims) for n, d in zip(_input_names(len(inputs)), inputs, strict=True)}
    types = _types(trt)
    hidden, top_k, down = dims["hidden"][-1], dims["expert_ids"][-1], dims["down"]
    inner = down[1] if attributes.get("transposed") else down[-1]
    if min(hidden, top_k, inner, *dims["up"], *down) < 1:
        raise UsageError(f"plugin {NAME}: only the number of tokens may be dynamic; inputs are {dims}")
    shape = ExpertShape.of(
        attributes,
        dtype=types[inputs[0].type],
        top_k=top_k,
        hidden=hidden,
        inner=inner,
        bias_dtype=types[inputs[5].type] if len(inputs) > 5 else None,
    )
    width = inner * (2 if shape.gated else 1)
    expected = {"up": (shape.num_experts, width, hidden), "down": (shape.num_experts, hidden, inner)}
    for name, (experts, rows, columns) in expected.items():
        wanted = (experts, columns, rows) if shape.transposed else (experts, rows, columns)
        if dims[name] != wanted:
            raise UsageError(f"plugin {NAME}: {name} is {dims[name]}; expected {wanted}")
    if shape.biased != int(len(inputs) > 5):
        raise UsageError(f"plugin {NAME}: biased {shape.biased}, but {len(inputs)} inputs")
    return shape


def _types(trt: Any) -> dict[Any, str]:
    return {getattr(trt, n): n for n in ("float32", "float16", "bfloat16", "int32")}


def _classes(trt: Any) -> Any:
    """The creator class on ``trt``'s base classes."""
    import numpy as np

    field_types = {
        int: trt.PluginFieldType.INT32,
        float: trt.PluginFieldType.FLOAT32,
        str: trt.PluginFieldType.CHAR,
    }
    numpy_types = {int: np.int32, float: np.float32}

    def field(name: str, value: Any) -> Any:
        kind = type(value)
        data = (
            np.frombuffer(value.encode() + b"\0", np.int8).copy()
            if kind is str
            else np.array([value], numpy_types[kind])
        )
        return trt.PluginField(name, data, field_types[kind]), data

    class ExpertPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self, kernels: Kernels, attributes: Mapping[str, Any]) -> None:
            for base in ExpertPlugin.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            self.num_outputs = 1
            self.timing_cache_id = ""
            self.metadata_string = f"moe-export {NAME} {attributes.get('layer', '')}"
            self.kernels, self.attributes = kernels, dict(attributes)
            self.tactic = BY_TOKENS
            self.shape: ExpertShape | None = None
            self._keep: list[Any] = []

        def get_capability_interface(self, _kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            made = ExpertPlugin(self.kernels, self.attributes)
            made.tactic, made.shape = self.tactic, self.shape
            return made

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], _shapes: Any, _builder: Any) -> list[Any]:
            return [trt.DimsExprs([inputs[0][0], inputs[0][1]])]

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            desc = in_out[pos].desc
            if desc.format != trt.TensorFormat.LINEAR:
                return False
            name = _types(trt).get(desc.type)
            if pos == 1:
                return name == "int32"
            if pos == 2:
                return name == "float32"
            if 5 <= pos < num_inputs:
                biases = ("float32", "float16", "bfloat16")
                return name in biases and (pos == 5 or desc.type == in_out[5].desc.type)
            return name not in (None, "int32") and (pos == 0 or desc.type == in_out[0].desc.type)

        @_reported
        def configure_plugin(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
            self.shape = _make_shape(trt, self.attributes, [d.desc for d in inputs])

        @_reported
        def get_workspace_size(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
            shape = _make_shape(trt, self.attributes, [d.desc for d in inputs])
            return scratch_bytes(shape, max(inputs[0].max[0], inputs[0].desc.dims[0]))

        def get_valid_tactics(self) -> list[int]:
            assert self.shape is not None, "TensorRT configures a plugin before it asks for tactics"
            return [BY_TOKENS, *range(BY_TOKENS + 1, BY_TOKENS + 1 + len(tile_sets(self.shape.dtype)))]

        def set_tactic(self, tactic: int) -> None:
            # 0 is TensorRT's default tactic.
            self.tactic = tactic or BY_TOKENS

        def attach_to_context(self, _resources: Any) -> Any:
            return self.clone()

        def _tiles(self, shape: ExpertShape, tokens: int) -> TileSet:
            if self.tactic == BY_TOKENS:
                return self.kernels.choose(shape, tokens)
            return tile_sets(shape.dtype)[self.tactic - BY_TOKENS - 1]

        @_reported
        def on_shape_change(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
            # Kernels are loaded here: enqueue may run under CUDA graph capture, which allows no loading.
            self.shape = _make_shape(trt, self.attributes, inputs)
            tokens = inputs[0].dims[0]
            if tokens:
                self.kernels.load(self.shape, self._tiles(self.shape, tokens))

        @_reported
        def enqueue(
            self,
            input_desc: Sequence[Any],
            _output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            shape = self.shape or _make_shape(trt, self.attributes, input_desc)
            tokens = input_desc[0].dims[0]
            if not tokens:
                return
            pointers = dict(zip(_input_names(len(inputs)), inputs, strict=True)) | {"out": outputs[0]}
            run(self.kernels, shape, self._tiles(shape, tokens), tokens, pointers, workspace, stream)

        def get_fields_to_serialize(self) -> Any:
            made = [field(name, value) for name, value in self.attributes.items()]
            self._keep = [data for _, data in made]  # a PluginField points into its array
            return trt.PluginFieldCollection([f for f, _ in made])

    class ExpertCreator(trt.IPluginCreatorV3One):
        def __init__(self, kernels: Kernels) -> None:
            super().__init__()
            self.kernels = kernels
            self.name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(a.name, np.array([]), field_types[a.kind]) for a in OPS[NAME].attributes]
            )

        @_reported
        def create_plugin(self, _name: str, fields: Sequence[Any], _phase: Any) -> Any:
            return ExpertPlugin(self.kernels, OPS[NAME].complete(decode_fields(fields)))

    return ExpertCreator
