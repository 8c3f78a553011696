"""Kernels compiled for a bundle: what is written, and that their machine code takes what adapters pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from moe_export_plugins.gpu import bundle_kernels
from moe_export_plugins.gpu.bundle_kernels import KernelSpec, expert_specs, router_specs, write_kernels
from moe_export_plugins.gpu.compile import CompiledKernel, Request
from moe_export_plugins.gpu.contract import CONTRACTS
from moe_export_plugins.gpu.experts import ExpertShape
from moe_export_plugins.gpu.library import INDEX, KernelLibrary, PtxOf

from moe_export.errors import CheckFailed, UsageError

from .memory_launcher import TRITON_ORDER

pytest.importorskip("triton", reason="pip install 'moe-export[gpu]'")
SHAPE = ExpertShape("float16", num_experts=5, top_k=2, hidden=24, inner=20, biased=1, bias_dtype="float16")


def smallest(shape: ExpertShape) -> list[KernelSpec]:
    """The kernels of the first set of tiles: few enough for a quick test."""
    return expert_specs(shape)[:4]


def test_written_kernels_are_what_adapters_launch(tmp_path: Path) -> None:
    specs = smallest(SHAPE)
    files = write_kernels(tmp_path, specs, [80, 120])
    assert set(files) == {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(files) == 1 + 4 * 2 * 2
    library = KernelLibrary.load(tmp_path)
    assert library.sms == (80, 120)
    index = {e["kernel"]: e for e in json.loads((tmp_path / INDEX).read_text())["kernels"]}
    for spec in specs:
        rules = CONTRACTS[spec.kernel]
        wanted = rules.parameters(spec.constants)
        # The machine code's own list of parameters, and the names of the Triton function's.
        assert index[spec.kernel]["parameters"] == [k for _, k in wanted]
        assert index[spec.kernel]["names"] == [n for n, _ in wanted] == list(TRITON_ORDER[spec.kernel])
        # The assembler's CUDA version is what the driver must know: newer for Blackwell.
        assert [index[spec.kernel]["images"][s]["cuda"] // 1000 for s in ("80", "120")] == [12, 13]
        cubin = library.cubin(spec.kernel, spec.dtype, spec.constants, spec.tile, 86)
        assert (
            cubin.code[:4] == b"\x7fELF" and cubin.entry.encode() in cubin.code and cubin.shared <= 48 * 1024
        )
        ptx = PtxOf(library, 120).ptx(spec.kernel, spec.dtype, spec.constants, spec.tile)
        assert f".entry {cubin.entry}(" in ptx.ptx and ptx.entry == cubin.entry and "sm_120a" in ptx.ptx
        assert ptx.parameters == tuple(k for _, k in wanted)


def test_equal_layers_share_their_kernels(tmp_path: Path) -> None:
    specs = smallest(SHAPE)
    assert len(write_kernels(tmp_path, specs + specs, [80])) == 1 + 4 * 2


def test_bad_requests_are_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no GPU kernels for SM 70"):
        write_kernels(tmp_path / "a", smallest(SHAPE), [70])
    with pytest.raises(UsageError, match="nothing to compile"):
        write_kernels(tmp_path / "a", smallest(SHAPE), [])
    with pytest.raises(UsageError, match="num_experts is 2000; expected at most 1024"):
        replace(SHAPE, num_experts=2000)
    assert not (tmp_path / "a").exists()


def test_kernels_that_fail_a_check_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bundle_kernels.compile_kernels

    def spilling(requests: Sequence[Request]) -> list[CompiledKernel]:
        *good, last = plain(requests)
        return [*good, replace(last, spill_bytes=8)]

    monkeypatch.setattr(bundle_kernels, "compile_kernels", spilling)
    with pytest.raises(CheckFailed, match=r"GPU kernel combine \(float16, sm_80, .*: 8 bytes of registers"):
        write_kernels(tmp_path / "a", smallest(SHAPE), [80])
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_set_of_tiles(dtype: str, tmp_path: Path) -> None:
    shape = replace(SHAPE, dtype=dtype, biased=0, activation="gelu")
    specs = expert_specs(shape) + router_specs({"num_experts": 5, "top_k": 2}, dtype)
    write_kernels(tmp_path, specs, [89])
    library = KernelLibrary.load(tmp_path)
    for spec in specs:
        library.cubin(spec.kernel, spec.dtype, spec.constants, spec.tile, 89)
