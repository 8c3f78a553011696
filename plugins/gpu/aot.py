"""The five kernels as ahead-of-time "quickly deployable plugins" of standard TensorRT.

The builder takes PTX, launch parameters and argument list into the plan; a service that loads the plan needs
neither this package nor Python. One plugin is one launch, so the experts of a layer are four nodes (see
``aot_graph``); scratch tensors are ordinary tensors between them. The router's plugin is registered, too, but
no pass places it: routing stays plain nodes, which can be compared and replayed. Choices are integers
(TensorRT keeps a NUL at the end of text), and no float is a kernel argument: floats are compiled in.

*Not run on a GPU.* The tests drive NVIDIA's own ``tensorrt.plugin`` sources.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_export.costs.tiles import Tile
from moe_export.errors import EnvironmentLacksError, UsageError

from .aot_plugins import BLOCK_ROWS, PLUGINS, AotPlugin
from .contract import DTYPES
from .expressions import evaluate

_TYPE_NAMES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int32": "INT32"}
_BROKEN, _OLDEST = (10, 14), (10, 15)


@dataclass(frozen=True)
class Image:
    """A compiled kernel: entry name, PTX, dynamic shared memory in bytes, its parameters in order."""

    entry: str
    ptx: str
    shared: int
    parameters: tuple[str, ...]
    """``pointer`` or ``int32`` each, read off the PTX."""


class KernelSource(Protocol):
    """Where PTX comes from: the compiler, or the kernels of a bundle."""

    def ptx(self, kernel: str, dtype: str, constants: Mapping[str, Any], tile: Tile) -> Image: ...


def check_tensorrt(trt: Any) -> None:
    """Refuse a library whose ahead-of-time plugins cannot work.

    Raises:
        EnvironmentLacksError: not standard TensorRT, version 10.14, or too old.
    """
    version = str(getattr(trt, "__version__", ""))
    match = re.match(r"(\d+)\.(\d+)", version)
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    advice = "pip install 'moe-export[tensorrt]'"
    if not hasattr(trt, "QuickPluginCreationRequest") and found != _BROKEN:
        raise EnvironmentLacksError(
            f"{trt.__name__} {version} has no ahead-of-time plugins; standard TensorRT has: {advice}"
        )
    if found == _BROKEN:
        raise EnvironmentLacksError(
            f"TensorRT {version} is refused: its plugin API is broken; install 10.15 or later: {advice}"
        )
    if found < _OLDEST:
        raise EnvironmentLacksError(
            f"TensorRT {version} is too old for these plugins; 10.15 or later: {advice}"
        )


def register(trt: Any, source: KernelSource) -> tuple[str, ...]:
    """Register all plugins with standard TensorRT; returns their ids. Once per process.

    Raises:
        EnvironmentLacksError: see :func:`check_tensorrt`.
    """
    check_tensorrt(trt)
    api = importlib.import_module(f"{trt.__name__}.plugin")
    for plugin in PLUGINS.values():
        _Registration(trt, api, plugin, source).run()
    return tuple(p.plugin_id for p in PLUGINS.values())


class _Registration:
    """The three functions that NVIDIA's decorators take. They read signatures, which are made here, since the
    plugins differ in their inputs and attributes."""

    def __init__(self, trt: Any, api: Any, plugin: AotPlugin, source: KernelSource) -> None:
        self._api, self._plugin, self._source = api, plugin, source
        self._types = {n: getattr(trt, n) for n in (*DTYPES, "int32")}
        self._names = {v: k for k, v in self._types.items()}
        self._described: set[tuple[Any, ...]] = set()

    def run(self) -> None:
        api, plugin = self._api, self._plugin
        inputs = [(t.name, api.TensorDesc) for t in plugin.inputs]
        attributes = [(a.name, int if a.kind is str else a.kind) for a in plugin.attributes]
        outputs = ("outputs", types.GenericAlias(tuple, (api.TensorDesc,)))
        result = types.GenericAlias(tuple, (api.TensorDesc,) * len(plugin.contract.outputs))
        combinations = types.GenericAlias(list, (api.AutoTuneCombination,))
        launch = types.GenericAlias(tuple, (str, str, api.KernelLaunchParams, api.SymIntExprs))
        signed = _with_signature
        api.register(plugin.plugin_id)(signed(self._describe, [*inputs, *attributes], result))
        api.autotune(plugin.plugin_id)(signed(self._autotune, [*inputs, *attributes, outputs], combinations))
        api.aot_impl(plugin.plugin_id)(
            signed(self._implement, [*inputs, *attributes, outputs, ("tactic", int)], launch)
        )

    def _describe(self, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        """Shapes and dtypes of the outputs."""
        dtypes = self._dtypes(inputs)
        constants = self._plugin.decode(attributes, dtypes)
        self._described.add(tuple(attributes[a.name] for a in self._plugin.attributes))
        dtype = self._plugin.dtype(dtypes)
        tile = next(iter(self._plugin.tactics(dtype, attributes.get(BLOCK_ROWS)).values()))
        values = self._symbols(constants, tile, inputs)
        return tuple(
            self._api.from_shape_expr(
                tuple(self._evaluate(d, values) for d in t.shape), self._types[t.dtype_of(dtype, constants)]
            )
            for t in self._plugin.contract.outputs
        )

    def _autotune(self, *given: Any) -> list[Any]:
        """One combination of types, since networks are strongly typed, and every tactic for it."""
        inputs, attributes, _ = self._split(given)
        dtypes = self._dtypes(inputs)
        constants, dtype = self._plugin.decode(attributes, dtypes), self._plugin.dtype(dtypes)
        names = [*dtypes, *(t.dtype_of(dtype, constants) for t in self._plugin.contract.outputs)]
        tactics = list(self._plugin.tactics(dtype, attributes.get(BLOCK_ROWS)))
        text = ", ".join(_TYPE_NAMES[n] for n in names)
        return [self._api.AutoTuneCombination(text, "LINEAR", tactics)]

    def _implement(self, *given: Any) -> tuple[str, str, Any, Any]:
        """Kernel, PTX, launch parameters and scalars of one tactic."""
        inputs, attributes, rest = self._split(given)
        dtypes, plugin = self._dtypes(inputs), self._plugin
        # Attributes come by position here, and by name to _describe: another order would be silently wrong.
        if tuple(attributes.values()) not in self._described:
            raise UsageError(
                f"{plugin.plugin_id}: attributes arrive in another order than they were registered in"
            )
        constants, dtype = plugin.decode(attributes, dtypes), plugin.dtype(dtypes)
        tile = plugin.tactics(dtype, attributes.get(BLOCK_ROWS))[int(rest[1])]
        self._check_sizes(inputs, constants, tile)
        image = self._source.ptx(plugin.kernel, dtype, constants, tile)
        expected = tuple(kind for _, kind in plugin.contract.parameters(constants))
        if image.parameters != expected:
            raise UsageError(
                f"{plugin.plugin_id}: the compiled kernel {image.entry} takes {image.parameters}, expected "
                f"{expected}"
            )
        values = self._symbols(constants, tile, inputs)
        launch = self._api.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = (
            self._evaluate(g, values) for g in plugin.contract.grid
        )
        launch.block_x = tile.threads
        launch.shared_mem = image.shared
        scalars = self._api.SymIntExprs(len(plugin.contract.scalars))
        for index, scalar in enumerate(plugin.contract.scalars):
            scalars[index] = self._api.SymInt32(self._evaluate(scalar.value, values))
        return image.entry, image.ptx, launch, scalars

    def _split(self, given: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any], Sequence[Any]]:
        """Inputs, attributes by name, the rest."""
        first = len(self._plugin.inputs)
        names = [a.name for a in self._plugin.attributes]
        last = first + len(names)
        return given[:first], dict(zip(names, given[first:last], strict=True)), given[last:]

    def _dtypes(self, inputs: Sequence[Any]) -> list[str]:
        out = []
        for tensor, desc in zip(self._plugin.inputs, inputs, strict=True):
            name = self._names.get(desc.dtype)
            allowed = DTYPES if tensor.dtype in ("data", "bias") else (tensor.dtype,)
            if name is None or name not in allowed:
                raise UsageError(
                    f"{self._plugin.plugin_id}: input {tensor.name} is {desc.dtype}; expected "
                    f"{', '.join(allowed)}"
                )
            out.append(name)
        return out

    def _symbols(self, constants: Mapping[str, Any], tile: Tile, inputs: Sequence[Any]) -> dict[str, Any]:
        """Values of the contract's symbols; T is the symbolic size of the input that has it first."""
        tokens = next(
            d.shape_expr[0] for t, d in zip(self._plugin.inputs, inputs, strict=True) if t.shape[0] == "T"
        )
        api = self._api
        functions: dict[str, Callable[[Any, Any], Any]] = {
            "cdiv": api.cdiv,
            "maximum": api.max,
            "minimum": api.min,
        }
        return self._plugin.contract.symbols(constants, tile, tokens, **functions)

    def _evaluate(self, text: str, values: Mapping[str, Any]) -> Any:
        api = self._api
        return evaluate(text, values, cdiv=api.cdiv, maximum=api.max, minimum=api.min)

    def _check_sizes(self, inputs: Sequence[Any], constants: Mapping[str, Any], tile: Tile) -> None:
        """Sizes that the kernel has compiled in are the tensors' own."""
        some, more = (self._plugin.contract.input_shapes(constants, tile, n) for n in (1000, 2000))
        for tensor, desc in zip(self._plugin.inputs, inputs, strict=True):
            for axis, (a, b) in enumerate(zip(some[tensor.name], more[tensor.name], strict=True)):
                size = int(desc.shape[axis])
                if a == b and size not in (a, -1):
                    raise UsageError(
                        f"{self._plugin.plugin_id}: input {tensor.name} has {size} in dimension {axis}; its "
                        f"attributes say {a}"
                    )


def _with_signature(
    function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], result: Any
) -> Callable[..., Any]:
    """``function`` under the signature that NVIDIA's checks read."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    vars(called)["__signature__"] = inspect.Signature(  # what inspect.signature looks for first
        [inspect.Parameter(n, kind, annotation=a) for n, a in parameters], return_annotation=result
    )
    return called
