"""The scaling benchmark of expert parallel: its options, and that its bytes are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem
from tests.expert_parallel.mpi import needs_mpi
from tests.helpers.tools import tool

main = tool("bench_expert_parallel").main
SIZES = {"hidden": "32", "inner": "48", "experts": "4", "layers": "1", "rounds": "1", "ranks": "1,2"}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    "arguments",
    [["--mode", "ring"], ["--ranks", "0"], ["--tokens", "x"], ["--json", "no/such/folder/x.json"]],
)
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "expected" in capsys.readouterr().err


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(bool(cpu_plugin_problem()), reason="needs the CPU plugin")
def test_bytes_are_the_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert main([*SMALL, "--tokens", "8", "--folder", str(tmp_path), "--json", str(file)]) == 0
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    assert [(r["ranks"], r["mode"]) for r in rows] == [(1, "one rank"), (2, "allreduce"), (2, "alltoall")]
    assert all(r["bytes"] == r["formula_bytes"] for r in rows) and rows[1]["bytes"] == 8 * 32 * 4
    assert "| speed-up" in capsys.readouterr().out
