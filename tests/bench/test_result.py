"""Reports: ratios, the gate for CI, JSON, the table."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moe_export.bench import BenchReport, Sanity, Skipped, format_table
from moe_export.bench.result import make_ratios
from moe_export.bench.table import markdown_table
from moe_export.errors import CheckFailed, UsageError
from tests.bench.samples import make_bench, row


def test_ratios_against_eager_and_the_best() -> None:
    report = make_bench()
    first = report.ratios[0]
    assert (first.phase, first.sequence, first.routing) == ("prefill", 128, "real")
    assert first.vs_eager == pytest.approx(2.0)
    # torch-compile is faster and has wrong numbers, so it does not count.
    assert first.best == "transformers-onnx-fused" and first.vs_best == pytest.approx(1.2)
    assert make_ratios(report.rows, frozenset())[0].best == "torch-compile"


def test_ratios_where_something_is_missing() -> None:
    alone = make_ratios((row("engine", "decode", 1.0),), frozenset())
    assert (alone[0].vs_eager, alone[0].best, alone[0].vs_best) == (None, None, None)
    assert make_ratios((row("pytorch-eager", "decode", 1.0),), frozenset()) == ()
    noisy = dataclasses.replace(row("pytorch-eager", "decode", 3.0), noisy=True)
    assert make_ratios((row("engine", "decode", 1.0), noisy), frozenset())[0].noisy


def test_summary_speaks_of_real_routing() -> None:
    summary = make_bench().summary()
    assert summary["vs_eager"] == {"decode": 2.0, "prefill": 2.0}
    assert summary["vs_best"] == {"decode": 1.2, "prefill": 1.2}
    assert summary["workloads"] == 3
    assert summary["slower"] == []
    assert summary["wrong_numbers"] == ["torch-compile"]
    assert summary["skipped"] == [] and summary["noisy"] is False


def test_being_slower_is_said() -> None:
    rows = (row("engine", "decode", 2.0), row("pytorch-eager", "decode", 1.0))
    draw = (row("engine", "decode", 1.02), row("pytorch-eager", "decode", 1.0))
    report = make_bench(rows=rows, ratios=make_ratios(rows, frozenset()))
    assert report.slower() == ["decode 1x128: 0.50x against pytorch-eager"]
    assert "SLOWER" in format_table(report)
    assert make_bench(rows=draw, ratios=make_ratios(draw, frozenset())).slower() == []


def test_json_and_back() -> None:
    report = make_bench()
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert BenchReport.from_dict(data) == report


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"rows": None}, "rows"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"task": 3}, "task"),
    ],
)
def test_a_damaged_report_is_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        BenchReport.from_dict({**make_bench().to_dict(), **change})
    with pytest.raises(UsageError, match="expected an object"):
        BenchReport.from_dict([])  # type: ignore[arg-type]


def test_the_gate_passes_and_fails() -> None:
    report = make_bench()
    report.require_speedup(1.9)
    report.require_speedup(1.1, "best")
    with pytest.raises(CheckFailed, match=r"against eager is below 2.5x: .*prefill 1x128 2\.00x") as caught:
        report.require_speedup(2.5)
    assert caught.value.exit_code == 1
    with pytest.raises(CheckFailed, match=r"against best is below 1.5x.*1\.20x"):
        report.require_speedup(1.5, "best")
    with pytest.raises(UsageError, match="against"):
        report.require_speedup(1.0, "worst")


def test_the_gate_fails_when_there_is_nothing_to_compare_with() -> None:
    skipped = (Skipped("pytorch-eager", "the source is gone"),)
    report = make_bench(ratios=(), skipped=skipped)
    with pytest.raises(CheckFailed, match="pytorch-eager: the source is gone"):
        report.require_speedup(1.0)


def test_the_gate_fails_for_an_engine_with_wrong_numbers() -> None:
    report = make_bench()
    engine = dataclasses.replace(report.contestants[0], sanity=Sanity(False, 3.0, 1e-3, "error 3"))
    wrong = dataclasses.replace(report, contestants=(engine, *report.contestants[1:]))
    with pytest.raises(CheckFailed, match="its speed means nothing: error 3"):
        wrong.require_speedup(0.1)


def test_the_gate_says_when_the_machine_was_busy() -> None:
    report = make_bench()
    busy = tuple(dataclasses.replace(r, noisy=True) for r in report.ratios)
    with pytest.raises(CheckFailed, match="other processes were busy"):
        dataclasses.replace(report, ratios=busy).require_speedup(9.0)


def test_the_table_says_everything() -> None:
    text = format_table(make_bench())
    for part in (
        "2 thread(s) each", "other processes used 0.10 cores", "WRONG NUMBERS", "transformers-onnx-fused",
        "prefill 1x512 zipf", "2.00x", "1.20x", "peak RSS", "p99 ms",
        "transformers-onnx (prefill 1x512 zipf): its routing cannot be replaced", "inputs are text",
    ):  # fmt: skip
        assert part in text, part
    assert "noisy" not in text


def test_the_table_warns_of_noise() -> None:
    machine = dataclasses.replace(make_bench().machine, foreign_cores=0.6)
    assert "noisy" in format_table(make_bench(machine=machine))


def test_table_columns_line_up_and_escape_bars() -> None:
    lines = markdown_table(["a", "b"], [["x|y", "1"], ["z", "22222"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "x\\|y" in lines[2]
