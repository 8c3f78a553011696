"""The layer benchmark: its inputs, its check of every contestant, and a short run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module", autouse=True)
def tools_on_path() -> Any:
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one-hot"])
def test_logits_choose_the_forced_experts(routing: str) -> None:
    from moe_layer import SHAPES, Layer

    from moe_export.ops import OPS

    layer = Layer(SHAPES["tiny"], "float32")
    inputs = layer.inputs(33, routing)
    _, ids = OPS["Router"].reference(inputs.logits, top_k=2, renormalize=1)
    np.testing.assert_array_equal(ids, inputs.ids)
    assert inputs.expected.shape == (len(inputs.checked), 64)
    assert inputs.checked[0] == 0 and inputs.checked[-1] == 32
    if routing == "one-hot":
        assert inputs.active == 2


@pytest.mark.parametrize(
    "broken", [lambda y: 2 * y, lambda y: 0 * y, lambda y: y[::-1], lambda y: y * np.nan]
)
def test_a_wrong_contestant_gets_no_time(broken: Any) -> None:
    from bench_moe_layer import _checked
    from moe_layer import SHAPES, Layer

    layer = Layer(SHAPES["tiny"], "float32")
    inputs = layer.inputs(5, "uniform")
    right = inputs.expected.astype(np.float32)
    _checked("right", lambda: right, inputs, "float32")
    with pytest.raises(SystemExit, match="broken: wrong result"):
        _checked("broken", lambda: np.ascontiguousarray(broken(right)), inputs, "float32")


def test_a_short_run_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench_moe_layer import main

    out = tmp_path / "rows.json"
    contestants = "eager,expert-loop,onnxruntime-moe,plugin-packed,plugin-unpacked"
    arguments = ["--shape", "tiny", "--tokens", "1,9", "--rounds", "2", "--threads", "1"]
    assert (
        main([*arguments, "--contestants", contestants, "--json", str(out), "--folder", str(tmp_path)]) == 0
    )
    rows = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert {row["tokens"] for row in rows} == {1, 9}
    assert {row["shape"] for row in rows} == {"tiny"}
    names = {row["contestant"] for row in rows}
    assert {"eager", "expert-loop", "onnxruntime-moe"} <= names
    for name in ("plugin-packed", "plugin-unpacked"):
        assert name in names or f"{name}: left out" in printed
    for row in rows:
        assert row["median_ms"] > 0 and row["ratio_to_best_other"] > 0 and row["dtype"] == "float32"
    assert "reads" in printed and "SGEMM" in printed


def test_unknown_contestants_and_shapes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from bench_moe_layer import main

    for arguments in (["--shape", "D"], ["--contestants", "mine"], ["--tokens", "0"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "expected" in capsys.readouterr().err
