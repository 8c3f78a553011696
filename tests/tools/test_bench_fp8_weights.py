"""The benchmark of float8 weights: a short run, and its check of what it times."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.tools import tool


def test_a_short_run_measures_every_kind(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    bench = tool("bench_fp8_weights")
    measured = bench.measure([1, 5], outputs=200, inputs=300)
    assert set(measured) == {1, 5}
    for times in measured.values():
        assert set(times) == {"float32", "bfloat16", "float8"} and min(times.values()) > 0
    monkeypatch.setattr(bench, "measure", lambda rows: {n: {"float32": 0.001, "float8": 0.004} for n in rows})
    assert bench.main(["--rows", "3"]) == 0
    assert "| 3 | 1.0 ms, 1.0 times | 4.0 ms, 4.0 times |" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tool("bench_fp8_weights")
    session = bench._session

    def doubled(kind: str, outputs: int, inputs: int) -> tuple[Any, Any]:
        made, weights = session(kind, outputs, inputs)
        return made, weights * (2 if kind == "float8" else 1)

    monkeypatch.setattr(bench, "_session", doubled)
    with pytest.raises(SystemExit, match="float8: wrong answer"):
        bench.measure([2], outputs=64, inputs=64)
