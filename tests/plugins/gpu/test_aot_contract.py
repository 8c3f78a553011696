"""The ahead-of-time plugins under NVIDIA's own ``tensorrt.plugin`` sources: shapes, types, tactics, grids,
scalars and argument order are what the kernels' calling convention says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from moe_export_plugins.gpu.aot import Image, check_tensorrt, register
from moe_export_plugins.gpu.aot_plugins import BLOCK_ROWS, PLUGINS, SHARING, AotPlugin
from moe_export_plugins.gpu.contract import CONTRACTS

from moe_export.costs.tiles import Tile, tiles
from moe_export.errors import EnvironmentLacksError, UsageError

from .qdp_host import Driven, Tensor, drive, nvidia_plugin_api

PROFILE = {"T": (1, 64, 300)}
TOKENS = (0, 1, 5, 64, 257)
CONSTANTS: dict[str, Any] = {"num_experts": 11, "top_k": 3, "hidden": 40, "inner": 24}
TRT_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}


class Written:
    """A source whose PTX says what was asked for; ``spoil`` gives its parameters a fault."""

    def __init__(self, spoil: bool = False) -> None:
        self.asked: list[tuple[str, str, dict[str, Any], Tile]] = []
        self._spoil = spoil

    def ptx(self, kernel: str, dtype: str, constants: Mapping[str, Any], tile: Tile) -> Image:
        self.asked.append((kernel, dtype, dict(constants), tile))
        kinds = tuple(kind for _, kind in CONTRACTS[kernel].parameters(constants))
        if self._spoil:
            kinds = kinds[::-1]
        return Image(f"{kernel}_{tile.rows}", f"// {kernel} {dtype} {tile}", 1024, kinds)


@pytest.fixture(scope="module")
def api() -> Iterator[tuple[Any, Written]]:
    with nvidia_plugin_api() as trt:
        source = Written()
        register(trt, source)
        yield trt, source


def constants_of(plugin: AotPlugin, **more: Any) -> dict[str, Any]:
    known = {a.name for a in plugin.contract.constants}
    given = {k: v for k, v in {**CONSTANTS, **more}.items() if k in known}
    if "biased" in known:
        given["biased"] = int(plugin.biased)
    full = plugin.contract.complete(given)
    # ONNX keeps floats in 32 bits.
    return {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in full.items()}


def inputs_of(plugin: AotPlugin, constants: Mapping[str, Any], tile: Tile, dtype: str) -> list[Tensor]:
    """The network's tensors: sizes that depend on T are dynamic, others fixed."""
    some, more = (plugin.contract.input_shapes(constants, tile, n) for n in (1000, 2000))
    out = []
    for t in plugin.inputs:
        name = f"{t.name}.0"
        sizes: list[int | str] = [
            a if a == b else ("T" if t.shape[i] == "T" else f"{name}.{i}")
            for i, (a, b) in enumerate(zip(some[t.name], more[t.name], strict=True))
        ]
        out.append(Tensor(tuple(sizes), TRT_NAMES[t.dtype_of(dtype, constants)]))
    return out


def profile_of(
    plugin: AotPlugin, constants: Mapping[str, Any], tile: Tile
) -> dict[str, tuple[int, int, int]]:
    """T, and every other dynamic size that follows from it."""
    sizes = [sizes_at(plugin, constants, tile, n) for n in PROFILE["T"]]
    return {k: (sizes[0][k], sizes[1][k], sizes[2][k]) for k in sizes[0]}


def sizes_at(plugin: AotPlugin, constants: Mapping[str, Any], tile: Tile, tokens: int) -> dict[str, int]:
    out = {"T": tokens}
    for name, shape in plugin.contract.input_shapes(constants, tile, tokens).items():
        out |= {f"{name}.0.{i}": size for i, size in enumerate(shape)}
    return out


def driven(
    trt: Any, plugin: AotPlugin, dtype: str, block_rows: int | None = None, **more: Any
) -> tuple[Driven, dict[str, Any], Tile]:
    constants = constants_of(plugin, **more)
    tile = next(t for t in tiles(plugin.kernel, dtype) if block_rows is None or t.rows == block_rows)
    found = drive(
        trt,
        plugin.plugin_id,
        inputs_of(plugin, constants, tile, dtype),
        plugin.encode(constants, block_rows),
        profile_of(plugin, constants, tile),
    )
    return found, constants, tile


CASES = [
    (name, dtype, rows)
    for name, plugin in PLUGINS.items()
    for dtype in ("float32", "float16", "bfloat16")
    for rows in ((16, 64) if plugin.kernel in SHARING else (None,))
]


@pytest.mark.parametrize(("name", "dtype", "rows"), CASES)
def test_every_plugin(api: tuple[Any, Written], name: str, dtype: str, rows: int | None) -> None:
    trt, source = api
    plugin = PLUGINS[name]
    source.asked.clear()
    found, constants, tile = driven(trt, plugin, dtype, rows)
    outputs = plugin.contract.outputs
    assert found.output_types == [TRT_NAMES[t.dtype_of(dtype, constants)] for t in outputs]
    given = [TRT_NAMES[t.dtype_of(dtype, constants)] for t in plugin.inputs]
    assert found.combinations == [(*given, *found.output_types)]
    own = [t for t in tiles(plugin.kernel, dtype) if rows is None or t.rows == rows]
    assert [tiles(plugin.kernel, dtype)[t - 1] for t in found.tactics] == own
    for tactic, launch in found.launches.items():
        used = tiles(plugin.kernel, dtype)[tactic - 1]
        asked = next(a for a in source.asked if a[3] == used)
        if plugin.kernel != "dispatch":  # it has no activations, so any dtype will do
            assert asked[1] == dtype
        assert asked[2] == constants and launch.code.decode() == f"// {plugin.kernel} {asked[1]} {used}"
        assert set(launch.scalar_types) == {"INT32"}
        for tokens in TOKENS:
            sizes = sizes_at(plugin, constants, tile, tokens)
            expected = plugin.contract.launch(constants, used, tokens)
            assert tuple(g.at(sizes) for g in launch.grid) == expected.grid
            assert tuple(b.at(sizes) for b in launch.block) == (expected.threads, 1, 1)
            assert launch.shared.at(sizes) == 1024
            assert tuple(s.at(sizes) for s in launch.scalars) == expected.scalars
    for tokens in TOKENS:
        sizes = sizes_at(plugin, constants, tile, tokens)
        shapes = tuple(tuple(d.at(sizes) for d in shape) for shape in found.output_shapes)
        assert shapes == plugin.contract.launch(constants, tile, tokens).output_shapes


def test_argument_order_is_inputs_scalars_outputs() -> None:
    """TensorRT passes input pointers, then the extra scalars, then output pointers."""
    for plugin in PLUGINS.values():
        kinds = [k for _, k in plugin.contract.parameters(constants_of(plugin))]
        expected = ["pointer"] * len(plugin.inputs) + ["int32"] * len(plugin.contract.scalars)
        assert kinds == expected + ["pointer"] * len(plugin.contract.outputs)


def test_no_attribute_is_text_and_choices_survive_the_round() -> None:
    for plugin in PLUGINS.values():
        for more in (
            {},
            {"activation": "relu2", "gated": 0},
            {"score": "sigmoid", "scale": 2.5},
            {"alpha": 0.5},
        ):
            constants = constants_of(plugin, **more)
            encoded = plugin.encode(constants, 16)
            assert all(type(v) in (int, float) for v in encoded.values())
            dtypes = [t.dtype_of("float16", constants) for t in plugin.inputs]
            assert plugin.decode(encoded, dtypes) == constants


def test_the_biases_dtype_is_the_tensors_own(api: tuple[Any, Written]) -> None:
    trt, source = api
    source.asked.clear()
    driven(trt, PLUGINS["GateUpBias"], "float16", 16, bias_dtype="float32")
    assert source.asked[0][2]["bias_dtype"] == "float32"


def test_a_fault_in_the_attributes_is_refused() -> None:
    plugin = PLUGINS["GateUp"]
    encoded = plugin.encode(constants_of(plugin), 16)
    dtypes = [t.dtype_of("float16", constants_of(plugin)) for t in plugin.inputs]
    with pytest.raises(UsageError, match="activation is 9; expected 0 to 5"):
        plugin.decode({**encoded, "activation": 9}, dtypes)
    with pytest.raises(UsageError, match="clamped_swiglu needs gated 1"):
        plugin.decode({**encoded, "activation": 5, "gated": 0}, dtypes)
    with pytest.raises(UsageError, match="block_rows is 48; choices"):
        plugin.tactics("float16", 48)
    with pytest.raises(UsageError, match="block_rows is required"):
        plugin.encode(constants_of(plugin))
    with pytest.raises(UsageError, match="bfloat16, float16"):
        plugin.dtype(["float16", "bfloat16", "int32", "int32"])


def wrong_size(plugin: AotPlugin, tile: Tile) -> list[Tensor]:
    given = inputs_of(plugin, constants_of(plugin), tile, "float16")
    return [Tensor(("T", 48), "HALF"), *given[1:]]


def test_other_sizes_than_compiled_in_are_refused(api: tuple[Any, Written]) -> None:
    trt, _ = api
    plugin = PLUGINS["GateUp"]
    tile = tiles("gate_up", "float16")[0]
    constants = constants_of(plugin)
    with pytest.raises(UsageError, match="input hidden has 48 in dimension 1; its attributes say 40"):
        drive(
            trt,
            plugin.plugin_id,
            wrong_size(plugin, tile),
            plugin.encode(constants, tile.rows),
            profile_of(plugin, constants, tile),
        )


def test_attributes_in_another_order_are_refused(api: tuple[Any, Written]) -> None:
    trt, _ = api
    plugin = PLUGINS["Combine"]
    constants, tile = constants_of(plugin), tiles("combine", "float16")[0]
    encoded = plugin.encode(constants)
    with pytest.raises(UsageError, match="another order"):
        drive(
            trt,
            plugin.plugin_id,
            inputs_of(plugin, constants, tile, "float16"),
            dict(reversed(encoded.items())),
            profile_of(plugin, constants, tile),
        )


def test_a_kernel_with_other_parameters_is_refused() -> None:
    with nvidia_plugin_api() as trt:
        register(trt, Written(spoil=True))
        with pytest.raises(UsageError, match="takes .*, expected"):
            driven(trt, PLUGINS["Router"], "float32")


def test_an_input_of_another_dtype_is_refused(api: tuple[Any, Written]) -> None:
    trt, _ = api
    plugin = PLUGINS["Combine"]
    constants, tile = constants_of(plugin), tiles("combine", "float16")[0]
    inputs = inputs_of(plugin, constants, tile, "float16")
    with pytest.raises(UsageError, match="input expert_ids is .*INT64; expected int32"):
        drive(
            trt,
            plugin.plugin_id,
            [inputs[0], Tensor(("T", 3), "INT64")],
            plugin.encode(constants),
            profile_of(plugin, constants, tile),
        )


class Library:
    __name__ = "tensorrt"

    def __init__(self, version: str, quick: bool = True) -> None:
        self.__version__ = version
        if quick:
            self.QuickPluginCreationRequest = object


@pytest.mark.parametrize(
    ("version", "quick", "text"),
    [
        ("10.14.1.48", True, "10.14.1.48 is refused: its plugin API is broken; install 10.15"),
        ("10.14.1.48", False, "is refused"),
        ("10.9.0.1", True, "too old"),
        ("1.7.1.116", False, "has no ahead-of-time plugins"),
    ],
)
def test_libraries_that_cannot_do_it_are_refused(version: str, quick: bool, text: str) -> None:
    with pytest.raises(EnvironmentLacksError, match=text):
        check_tensorrt(Library(version, quick))


def test_others_are_taken() -> None:
    for version in ("10.15.0.1", "11.4.0.106"):
        check_tensorrt(Library(version))


def test_block_rows_is_an_attribute_of_the_three_that_share_blocks() -> None:
    with_it = {p.kernel for p in PLUGINS.values() if BLOCK_ROWS in {a.name for a in p.attributes}}
    assert with_it == set(SHARING)
    assert np.all([p.name == n for n, p in PLUGINS.items()])
