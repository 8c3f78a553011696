"""The benchmark of the small ops: a short run, and its check of what it times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .kernels import plugin

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module", autouse=True)
def tools_on_path() -> Any:
    plugin()
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


def test_a_short_run_measures_every_op_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench_ops import KNOWN, SIZES, main

    out = tmp_path / "rows.json"
    arguments = ["--tokens", "3", "--rounds", "1", "--threads", "1", "--tries", "1", "--json", str(out)]
    assert main([*arguments, "--markdown"]) == 0
    rows = json.loads(out.read_text())
    ops = {row["op"] for row in rows}
    assert ops == set(KNOWN) and len(ops) == 8
    assert len(rows) == len(ops) * len(SIZES)
    assert all(row["kernel_ms"] > 0 and row["body_ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| `Router` |") == len(SIZES)


@pytest.mark.parametrize("op", ["Router", "Combine"])
def test_a_kernel_that_differs_from_its_body_gets_no_time(op: str) -> None:
    from bench_ops import _compare, make_case, make_session

    case = make_case(op, 8, 2, 5)
    outputs = make_session(case, 1, None).run(None, dict(case.inputs))
    _compare(case, outputs, outputs)
    for broken in (lambda y: y[::-1], lambda y: 2 * y + 1, lambda y: 0 * y - 1):
        with pytest.raises(SystemExit, match="kernel and body differ"):
            _compare(case, [np.ascontiguousarray(broken(y)) for y in outputs], outputs)


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from bench_ops import main

    for arguments in (
        ["--op", "ExpertMLP"],
        ["--tokens", "0"],
        ["--rounds", "0"],
        ["--threads", "1,2"],
        ["--json", "no/such/folder/rows.json"],
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "expected" in capsys.readouterr().err
