"""docs/gpu-kernels.md is what its generator writes now; tools/kernel_table.py prints and judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moe_export_plugins.gpu.checks import problems
from moe_export_plugins.gpu.compile import compile_kernels
from moe_export_plugins.gpu.contract import CONTRACTS
from moe_export_plugins.gpu.matrix import SMS, requests, table_row

from tests.helpers.tools import check_stale_page_is_found, tool

generator = tool("generate_kernels_doc")
PAGE = generator.PAGE


def test_parts_that_need_no_compiler_are_fresh() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(generator.HEAD)
    assert "\n".join(generator.predictions()) in text
    for contract in CONTRACTS.values():
        assert "\n".join(generator._convention(contract)) in text
    assert "No kernel was run on a" in text and "*predicted*" in text


def test_table_has_every_kernel_and_some_are_compiled_again() -> None:
    text = PAGE.read_text(encoding="utf-8")
    wanted = requests()
    rows = [line for line in text.splitlines() if " sm_" in line]
    assert len(rows) == len(wanted) and all(line.endswith("| - |") for line in rows)
    few = [r for r in wanted if r.dtype == "bfloat16" and r.kernel == "down" and r.tile.rows == 64]
    for kernel in compile_kernels([r for r in few if r.sm in ("sm_80", "sm_90a")]):
        assert "| " + " | ".join(table_row(kernel)) + " |" in rows


def test_check_finds_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [r for r in requests(sms=("sm_80",), dtypes=("float16",)) if r.kernel == "combine"]
    monkeypatch.setattr(generator, "requests", lambda: few)
    check_stale_page_is_found(generator, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_matrix_fulfils_the_checks_and_the_page_is_fresh() -> None:
    kernels = compile_kernels(requests())
    assert [(*table_row(k)[:4], p) for k in kernels for p in problems(k)] == []
    for kernel in kernels:
        if CONTRACTS[kernel.kernel].is_gemm and kernel.tile.rows >= 64:
            word = {"sm_90a": "HGMMA", "sm_100a": "UTCHMMA"}.get(kernel.sm, "HMMA")
            assert set(kernel.tensor_instructions) == {word}
    assert {k.sm for k in kernels} == set(SMS)
    assert PAGE.read_text(encoding="utf-8") == generator.page(kernels)


def test_table_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = tool("kernel_table")
    monkeypatch.setattr(
        command, "requests", lambda **given: [r for r in requests(**given) if r.kernel == "combine"]
    )
    assert command.main(["--sm", "80", "--dtype", "float16", "--few", "--json"]) == 0
    printed = capsys.readouterr()
    rows: list[dict[str, Any]] = json.loads(printed.out)
    assert [(r["kernel"], r["SM"], r["problems"]) for r in rows] == [("combine", "sm_80", "-")]
    assert "Not run on a GPU" in printed.err
    monkeypatch.setattr(command, "problems", lambda _kernel: ("broken",))
    assert command.main(["--sm", "80", "--dtype", "float16", "--few"]) == 1
    assert "registers" in capsys.readouterr().out
    assert command.main(["--sm", "70"]) == 2
    assert "no GPU kernels for SM '70'" in capsys.readouterr().err
    assert command.main(["--sm", "80,"]) == 2
    assert "no GPU kernels for SM ''" in capsys.readouterr().err
    assert command.main(["--dtype", "float8"]) == 2
    assert "no dtype 'float8'" in capsys.readouterr().err
