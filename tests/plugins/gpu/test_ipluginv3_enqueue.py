"""What the plugin's enqueue launches computes ExpertMLP: on TensorRT-RTX's own classes, with launches run
by Triton's interpreter instead of a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_export_plugins.gpu.bundle_kernels import expert_specs
from moe_export_plugins.gpu.driver import Device
from moe_export_plugins.gpu.experts import ExpertShape, TileSet, plan, scratch_bytes, tile_sets
from moe_export_plugins.gpu.ipluginv3 import BY_TOKENS, _classes, decode_fields
from moe_export_plugins.gpu.launching import Kernels
from numpy.typing import NDArray

from moe_export.costs.tiles import tiles
from moe_export.errors import BundleError, UsageError
from moe_export.ops import OPS

from .kernel_cases import LIMITS
from .memory_launcher import MemoryLauncher, numpy_type, stand_in_library

trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'moe-export[tensorrt-rtx]'")
TRT_TYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int32": "int32"}
GUARD = 512


def inputs_of(shape: ExpertShape, tokens: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    kind = numpy_type(shape.dtype)
    e, h, i = shape.num_experts, shape.hidden, shape.inner
    w = i * (2 if shape.gated else 1)
    up, down = rng.standard_normal((e, w, h)) / 4, rng.standard_normal((e, h, i)) / 4
    if shape.transposed:
        up, down = up.swapaxes(1, 2), down.swapaxes(1, 2)
    out = {
        "hidden": rng.standard_normal((tokens, h)).astype(kind),
        "expert_ids": rng.integers(-1, e + 1, (tokens, shape.top_k)).astype(np.int32),
        "weights": rng.random((tokens, shape.top_k)).astype(np.float32),
        "up": np.ascontiguousarray(up).astype(kind),
        "down": np.ascontiguousarray(down).astype(kind),
    }
    if shape.biased:
        bias = numpy_type(shape.bias_dtype)
        out |= {"up_bias": rng.standard_normal((e, w)).astype(bias)}
        out |= {"down_bias": rng.standard_normal((e, h)).astype(bias)}
    return out


def attributes_of(shape: ExpertShape) -> dict[str, Any]:
    own = {a.name for a in OPS["ExpertMLP"].attributes}
    return OPS["ExpertMLP"].complete(
        {k: v for k, v in shape.to_json().items() if k in own} | {"layer": "layers.3"}
    )


def described(array: NDArray[Any], dtype: str) -> Any:
    desc = trt.PluginTensorDesc()
    desc.dims, desc.type, desc.format = array.shape, getattr(trt, dtype), trt.TensorFormat.LINEAR
    return desc


def run_plugin(plugin: Any, shape: ExpertShape, given: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """As a TensorRT runtime does: shapes first, then enqueue with as much workspace as was asked for."""
    dtypes = [shape.dtype, "int32", "float32", shape.dtype, shape.dtype, shape.bias_dtype, shape.bias_dtype]
    descs = [described(a, d) for a, d in zip(given.values(), dtypes, strict=False)]
    dynamic = []
    for desc, name in zip(descs, given, strict=True):
        d = trt.DynamicPluginTensorDesc()
        first = (-1,) if name in ("hidden", "expert_ids", "weights") else desc.dims[:1]
        d.desc = described(given[name], dtypes[list(given).index(name)])
        d.desc.dims = (*first, *desc.dims[1:])
        d.min, d.opt, d.max = desc.dims, desc.dims, desc.dims
        dynamic.append(d)
    size = plugin.get_workspace_size(dynamic, [])
    # Aligned as TensorRT aligns, with a fence behind.
    memory = np.full(size + 2 * GUARD, 171, np.uint8)
    skip = -memory.ctypes.data % 256
    out = np.full(given["hidden"].shape, np.nan, given["hidden"].dtype)
    plugin.on_shape_change(descs, [])
    plugin.enqueue(
        descs,
        [descs[0]],
        [a.ctypes.data for a in given.values()],
        [out.ctypes.data],
        memory.ctypes.data + skip,
        77,
    )
    assert (memory[skip + size :] == 171).all(), "written behind the workspace"
    return out


def error(out: NDArray[Any], shape: ExpertShape, given: dict[str, NDArray[Any]]) -> float:
    """Largest error relative to the largest number of the float64 reference."""
    keep = {k: v for k, v in attributes_of(shape).items() if k not in ("layer",)}
    wanted = OPS["ExpertMLP"].reference(
        given["hidden"], given["expert_ids"], given["weights"], given["up"], given["down"],
        given.get("up_bias"), given.get("down_bias"), **keep,
    )  # fmt: skip
    return float(np.abs(out.astype(np.float64) - wanted).max() / np.abs(wanted).max())


SMALL = ExpertShape("float32", num_experts=5, top_k=2, hidden=24, inner=20)
SHAPES = {
    "float32": SMALL,
    "float16": replace(SMALL, dtype="float16"),
    "bfloat16": replace(SMALL, dtype="bfloat16"),
    "biased, other dtype of the bias": replace(
        SMALL, dtype="float16", activation="clamped_swiglu", layout="interleaved", biased=1, limit=1.5
    ),
    "ungated, transposed": replace(SMALL, activation="relu2", gated=0, transposed=1),
}


def make(shape: ExpertShape, folder: Path, launcher: MemoryLauncher) -> Any:
    kernels = Kernels(stand_in_library(folder, expert_specs(shape)), launcher)
    creator = _classes(trt)(kernels)
    fields = [trt.PluginField(*f) for f in onnx_fields(attributes_of(shape))]
    return creator.create_plugin("ExpertMLP", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)


def onnx_fields(attributes: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Fields as the ONNX parser gives them: text with a NUL behind it."""
    kinds = trt.PluginFieldType
    out: list[tuple[Any, ...]] = []
    for name, value in attributes.items():
        if isinstance(value, str):
            out.append((name, KEEP(np.frombuffer(value.encode() + b"\0", np.int8).copy()), kinds.CHAR))
        elif isinstance(value, float):
            out.append((name, KEEP(np.array([value], np.float32)), kinds.FLOAT32))
        else:
            out.append((name, KEEP(np.array([value], np.int32)), kinds.INT32))
    return out


_KEPT: list[Any] = []


def KEEP(array: NDArray[Any]) -> NDArray[Any]:  # noqa: N802  # reads as a mark on the value
    """A PluginField points into its array."""
    _KEPT.append(array)
    return array


@pytest.mark.parametrize("name", SHAPES)
def test_numbers_of_the_reference(name: str, tmp_path: Path) -> None:
    shape, launcher = SHAPES[name], MemoryLauncher()
    plugin = make(shape, tmp_path, launcher)
    given = inputs_of(shape, 7)
    assert error(run_plugin(plugin, shape, given), shape, given) <= LIMITS[shape.dtype]
    assert launcher.launched == ["dispatch", "gate_up", "down", "combine"]


def test_every_tactic_computes_the_same_and_loads_once(tmp_path: Path) -> None:
    launcher = MemoryLauncher()
    plugin, shape = make(SMALL, tmp_path, launcher), SMALL
    given = inputs_of(shape, 9)
    run_plugin(plugin, shape, given)
    tactics = plugin.get_valid_tactics()
    assert tactics == [BY_TOKENS, *range(2, 2 + len(tile_sets("float32")))] and min(tactics) > 0
    for tactic in tactics[1:]:
        plugin.set_tactic(tactic)
        assert error(run_plugin(plugin, shape, given), shape, given) <= LIMITS["float32"]
    loads = launcher.loads
    plugin.clone().attach_to_context(None)
    run_plugin(plugin, shape, given)
    assert launcher.loads == loads == 4 * len(tile_sets("float32"))


def test_no_token(tmp_path: Path) -> None:
    launcher = MemoryLauncher()
    out = run_plugin(make(SMALL, tmp_path, launcher), SMALL, inputs_of(SMALL, 0))
    assert out.shape == (0, 24) and launcher.launched == []


def test_a_wrong_argument_is_seen(tmp_path: Path) -> None:
    given = inputs_of(SMALL, 7)
    out = run_plugin(make(SMALL, tmp_path, MemoryLauncher(spoil=True)), SMALL, given)
    assert error(out, SMALL, given) > 1e-2


def test_types_and_formats(tmp_path: Path) -> None:
    plugin = make(replace(SMALL, biased=1), tmp_path, MemoryLauncher())
    half, full, ints = "float16", "float32", "int32"

    def takes(*types: str, at: int, layout: str = "LINEAR") -> bool:
        descs = []
        for name in types:
            d = trt.DynamicPluginTensorDesc()
            d.desc = described(np.zeros((1, 1), np.float32), name)
            d.desc.format = getattr(trt.TensorFormat, layout)
            descs.append(d)
        return bool(plugin.supports_format_combination(at, descs, 7))

    good = (half, ints, full, half, half, full, full, half)
    assert all(takes(*good, at=i) for i in range(8))
    assert not any(takes(*good, at=i, layout="HWC") for i in range(8))
    for position, wrong in (
        (0, ints),
        (1, half),
        (2, half),
        (3, full),
        (4, full),
        (5, ints),
        (6, half),
        (7, full),
    ):
        spoiled = list(good)
        spoiled[position] = wrong
        assert not takes(*spoiled, at=position), position


def test_attributes_survive_the_plan(tmp_path: Path) -> None:
    shape = replace(SMALL, activation="clamped_swiglu", layout="interleaved", alpha=0.5, limit=2.0)
    plugin = make(shape, tmp_path, MemoryLauncher())
    fields = plugin.get_fields_to_serialize()
    assert decode_fields(fields) == attributes_of(shape)


def refusal(shape: ExpertShape, tmp_path: Path, **change: NDArray[Any]) -> None:
    given = inputs_of(shape, 3)
    run_plugin(make(shape, tmp_path, MemoryLauncher()), shape, {**given, **change})


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"up is \(5, 39, 24\); expected \(5, 40, 24\)"):
        refusal(SMALL, tmp_path, up=np.zeros((5, 39, 24), np.float32))
    with pytest.raises(UsageError, match="down is"):
        refusal(SMALL, tmp_path, down=np.zeros((5, 25, 20), np.float32))


def test_a_library_for_other_experts_is_refused(tmp_path: Path) -> None:
    other = replace(SMALL, top_k=3)
    plugin = make(SMALL, tmp_path / "a", MemoryLauncher())
    plugin.kernels = Kernels(stand_in_library(tmp_path / "b", expert_specs(other)), MemoryLauncher())
    with pytest.raises(BundleError, match="no kernel dispatch .*it holds"):
        run_plugin(plugin, SMALL, inputs_of(SMALL, 3))


def test_engines_of_two_bundles_live_in_one_process(tmp_path: Path) -> None:
    other = replace(SMALL, top_k=3)
    plugin = make(SMALL, tmp_path / "a", MemoryLauncher())
    plugin.kernels.add(stand_in_library(tmp_path / "b", expert_specs(other)), None)
    for shape in (SMALL, other):
        given = inputs_of(shape, 3)
        assert error(run_plugin(plugin, shape, given), shape, given) <= LIMITS["float32"]


def test_a_gpu_with_too_little_shared_memory(tmp_path: Path) -> None:
    class Small(MemoryLauncher):
        def device(self) -> Device:
            return replace(super().device(), shared_limit=512)

    with pytest.raises(BundleError, match="takes 1024 bytes of shared memory; GPU of the test has 512"):
        run_plugin(make(SMALL, tmp_path, Small()), SMALL, inputs_of(SMALL, 3))


def test_without_kernels_the_message_says_what_to_call(tmp_path: Path) -> None:
    plugin = _classes(trt)(Kernels(None, MemoryLauncher())).create_plugin(
        "ExpertMLP",
        trt.PluginFieldCollection([trt.PluginField(*f) for f in onnx_fields(attributes_of(SMALL))]),
        trt.TensorRTPhase.RUNTIME,
    )
    with pytest.raises(BundleError, match="no compiled kernels; give the bundle's folder"):
        run_plugin(plugin, SMALL, inputs_of(SMALL, 3))


def test_packed_weights_and_bad_fields_are_refused() -> None:
    with pytest.raises(UsageError, match="packed for the CPU plugin"):
        ExpertShape.of({"num_experts": 4, "packed": 1}, dtype="float32", top_k=2, hidden=8, inner=8)
    with pytest.raises(UsageError, match="field gated: expected one number, got 2"):
        decode_fields([trt.PluginField("gated", KEEP(np.array([1, 1], np.int32)), trt.PluginFieldType.INT32)])
    with pytest.raises(UsageError, match="dtype 'float8'"):
        replace(SMALL, dtype="float8")


def test_blocks_are_shared_by_three_kernels() -> None:
    few, many = tile_sets("float16")[0], tile_sets("float16")[-1]
    with pytest.raises(UsageError, match="share blocks"):
        TileSet(few.dispatch, few.gate_up, many.down, few.combine)
    assert [s.gate_up for s in tile_sets("float16")] == list(tiles("gate_up", "float16"))


def test_workspace_grows_with_tokens_and_scratch_does_not_overlap() -> None:
    shape = ExpertShape("bfloat16", num_experts=64, top_k=8, hidden=2048, inner=1024)
    sizes = [scratch_bytes(shape, n) for n in (0, 1, 8, 100, 4096)]
    assert sizes == sorted(sizes)
    for chosen in tile_sets("bfloat16"):
        planned = plan(shape, chosen, 100)
        edges = sorted(planned.offsets.values())
        assert len(set(edges)) == 5 and all(e % 256 == 0 for e in edges)
        assert planned.scratch_bytes <= sizes[3]


def test_neither_tensorrt_is_imported_by_the_module() -> None:
    code = (
        "import sys, moe_export_plugins.gpu.ipluginv3 as m, moe_export_plugins.gpu.aot as a\n"
        "bad = [n for n in sys.modules if n.split('.')[0] in "
        "('tensorrt', 'tensorrt_rtx', 'triton', 'torch', 'cuda', 'onnx')]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
