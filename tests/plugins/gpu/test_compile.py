"""Compiling without a GPU: every SM, the checks of compiled kernels, the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moe_export_plugins.gpu import compile as compile_module
from moe_export_plugins.gpu.checks import problems, require
from moe_export_plugins.gpu.compile import CompiledKernel, Request, compile_kernel, compile_kernels
from moe_export_plugins.gpu.contract import CONTRACTS
from moe_export_plugins.gpu.matrix import requests
from moe_export_plugins.gpu.ptx import parameters

from moe_export.costs.tiles import TILES, Tile, tiles
from moe_export.errors import CheckFailed, EnvironmentLacksError, ExportError, UsageError

BROKEN = "tests.plugins.gpu.broken_kernels"
COMBINE: dict[str, Any] = {"num_experts": 6, "top_k": 2, "hidden": 64}
DOWN: dict[str, Any] = {**COMBINE, "inner": 64}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compile_module.VARIABLE, str(cache))


def test_one_kernel_for_some_sms() -> None:
    wanted = {"80": "HMMA", "90a": "HGMMA", "100a": "UTCHMMA", "121a": "HMMA"}
    tile = tiles("down", "bfloat16")[2]
    for kernel, (sm, word) in zip(
        compile_kernels([Request("down", DOWN, "bfloat16", sm, tile) for sm in wanted]),
        wanted.items(),
        strict=True,
    ):
        assert problems(kernel) == () and require(kernel) is kernel
        assert kernel.sm == f"sm_{sm}" and kernel.cubin[:4] == b"\x7fELF"
        assert set(kernel.tensor_instructions) == {word}
        assert kernel.parameters == ("pointer",) * 5 + ("int32", "pointer") == parameters(kernel.ptx)
        assert f".visible .entry {kernel.entry}(" in kernel.ptx
        assert f".target sm_{sm}" in kernel.ptx
        assert kernel.grid == CONTRACTS["down"].grid
        assert 0 < kernel.occupancy <= 1


def test_all_five_kernels_have_their_parameters() -> None:
    constants = {
        "router": {"num_experts": 6, "top_k": 2, "biased": 1},
        "dispatch": {"num_experts": 6, "top_k": 2},
        "gate_up": {**DOWN, "biased": 1, "layout": "interleaved", "activation": "clamped_swiglu"},
        "down": {**DOWN, "biased": 1},
        "combine": COMBINE,
    }
    kernels = compile_kernels(
        [Request(k, c, "float16", "89", tiles(k, "float16")[0]) for k, c in constants.items()]
    )
    for kernel in kernels:
        assert problems(kernel) == ()
    assert "up_bias" in kernels[2].parameter_names
    assert len({k.entry for k in kernels}) == 5


def test_float32_products_use_tensor_cores_and_keep_their_digits() -> None:
    """Three TF32 products: about 24 of them per product of 16x8x8, and none in a single TF32 pass."""
    kernel = compile_kernel("down", DOWN, "float32", "80", tiles("down", "float32")[0])
    assert problems(kernel) == ()
    assert kernel.tensor_instructions["HMMA"] % 3 == 0


FAULTS: dict[str, tuple[str, dict[str, Any], Tile, str]] = {
    "other_order": (
        "combine", COMBINE, Tile(1, 64), "named expert_ids, rows, T, out; .* has rows, expert_ids, T, out",
    ),
    "scalar_lost": (
        "combine", COMBINE, Tile(1, 64), "are pointer, pointer, pointer; .* has pointer, pointer, int32",
    ),
    "adds_in_any_order": ("combine", COMBINE, Tile(1, 64), r"atomic operations on floats \(.*f16"),
    "without_tensor_cores": ("down", DOWN, Tile(16, 64, 64), "no tensor-core instruction"),
    "spills": ("down", DOWN, Tile(16, 64, 64, warps=1), "bytes of registers are spilled; expected 0"),
    "much_shared_memory": ("down", DOWN, Tile(16, 64, 64), "shared memory; expected at most 49152"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(cache: Path) -> dict[str, CompiledKernel]:
    """All broken kernels, by one compiler process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compile_module.VARIABLE, str(cache))
        wanted = [
            Request(kernel, constants, "float16", "80", tile, (BROKEN, name))
            for name, (kernel, constants, tile, _) in FAULTS.items()
        ]
        return dict(zip(FAULTS, compile_kernels(wanted), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_checks_find_each_fault(name: str, faulty: dict[str, CompiledKernel]) -> None:
    with pytest.raises(CheckFailed, match=FAULTS[name][3]):
        require(faulty[name])


def test_hidden_parameters_left_in_are_found() -> None:
    kernel = compile_kernel("combine", COMBINE, "float16", "80", Tile(1, 64))
    more = replace(kernel, parameters=(*kernel.parameters, "pointer", "pointer"))
    assert any("calling convention" in p for p in problems(more))


def test_second_request_is_read_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_kernel("combine", COMBINE, "float16", "80", Tile(1, 64))

    def never(_requests: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compile_module, "_worker_compiles", never)
    assert compile_kernel("combine", COMBINE, "float16", "sm_80", Tile(1, 64)) == first
    with pytest.raises(AssertionError, match="compiled again"):
        compile_kernel("combine", {**COMBINE, "hidden": 65}, "float16", "80", Tile(1, 64))


def test_damaged_cache_file_is_compiled_again(cache: Path) -> None:
    request = Request("combine", COMBINE, "float16", "86", Tile(1, 64))
    first = compile_kernels([request])[0]
    path = next(cache.glob(f"combine-{request.key[:32]}.json"))
    for damage in ("", "{", json.dumps({"key": request.key}), json.dumps({"key": "another"})):
        path.write_text(damage)
        assert compile_module._load(request) is None
    assert compile_kernels([request])[0] == first


def test_errors_name_the_kernel() -> None:
    what = r"(?s)GPU kernel combine \(float16, sm_80, tile 1x64 w4\): "
    with pytest.raises(ExportError, match=what + ".*no_such_thing"):
        compile_kernels([Request("combine", COMBINE, "float16", "80", Tile(1, 64), (BROKEN, "fails"))])
    with pytest.raises(UsageError, match="no GPU kernels for SM '75'; .*choices: sm_100a, sm_103a"):
        compile_kernel("combine", COMBINE, "float16", "75", Tile(1, 64))
    with pytest.raises(UsageError, match="no dtype 'float8'"):
        compile_kernel("combine", COMBINE, "float8", "80", Tile(1, 64))
    with pytest.raises(UsageError, match="rows is 3; expected a power of two"):
        Tile(3)


def test_a_compiler_that_ends_its_process_is_told() -> None:
    function = ("tests.plugins.gpu.ends_the_process", "any")
    request = Request("combine", COMBINE, "float16", "80", Tile(1, 64), function)
    with pytest.raises(ExportError, match=r"ended its process \(code -6\): .*LLVM ERROR: it does not know"):
        compile_kernels([request])


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def absent(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", absent)
    compile_module.triton_version.cache_clear()
    with pytest.raises(EnvironmentLacksError, match=r"pip install 'moe-export\[gpu\]'"):
        compile_kernel("combine", COMBINE, "float16", "80", Tile(1, 64))
    compile_module.triton_version.cache_clear()


def test_matrix_covers_what_is_promised() -> None:
    for few in (True, False):
        found = requests(every_tile=not few)
        cases = {(r.kernel, r.dtype, r.sm) for r in found if CONTRACTS[r.kernel].is_gemm}
        assert len(cases) == 2 * 3 * 6
        for case in cases:
            assert sum((r.kernel, r.dtype, r.sm) == case for r in found) >= 2
    shared = {k: {t.rows for t in TILES[k]["bfloat16"]} for k in ("dispatch", "gate_up", "down")}
    assert shared["gate_up"] == shared["down"] <= shared["dispatch"]
