"""The contest: turns, sanity, skips. Contestants are plain Python and run in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_export.bench.contest import Contest, WorkloadFiles
from moe_export.bench.grid import Workload
from moe_export.bench.process import LocalSeat
from moe_export.bench.result import EAGER, ENGINE, Sanity
from moe_export.bench.runner import Runner, write_routing
from moe_export.bench.sanity import compare_check, compare_sample
from moe_export.errors import BundleError
from moe_export.progress import NullProgress
from tests.bench.samples import CountingRunner, FragileRunner, NaNRunner, ShyRunner

SHORT, LONG = Workload("prefill", 1, 4), Workload("prefill", 1, 16)
DECODE = Workload("decode", 1, 4)


@pytest.fixture
def contest() -> Iterator[Contest]:
    with Contest("float32", NullProgress()) as made:
        ids = np.arange(8, dtype=np.int64)[None]
        made.write("check", {"input_ids": ids[:, :5], "next_ids": ids[:, 5:]})
        yield made


def files(contest: Contest, workload: Workload) -> WorkloadFiles:
    ids = np.arange(workload.sequence + 3, dtype=np.int64)[None]
    arrays = {"input_ids": ids[:, : workload.sequence]}
    if workload.phase == "decode":
        arrays["next_ids"] = ids[:, workload.sequence :]
    return WorkloadFiles(contest.write(f"inputs-{workload.text.replace(' ', '-')}", arrays))


def enter(contest: Contest, name: str, runner: Runner, **options: Any) -> bool:
    return contest.enter(name, f"the {name}", lambda: LocalSeat(runner), **options)


def three(contest: Contest, log: list[str], **options: Any) -> None:
    """Engine, eager and a third called ``other`` with ``options``."""
    for name in (ENGINE, EAGER):
        enter(contest, name, CountingRunner(name, log))
    enter(contest, "other", CountingRunner("other", log, **options))
    contest.judge()
    log.clear()


def sanities(contest: Contest) -> dict[str, Sanity]:
    return {e.info.name: e.info.sanity for e in contest.entries}


def test_contestants_take_turns(contest: Contest) -> None:
    log: list[str] = []
    three(contest, log)
    contest.measure(DECODE, files(contest, DECODE), rounds=3, warmup=1)
    visits = [line.split()[0] for line in log if line.endswith("prefill")]
    assert visits == [ENGINE, EAGER, "other"] * 4
    # Every turn is one prefill and all decode steps of that contestant, undisturbed.
    turn = [f"{ENGINE} prefill", *[f"{ENGINE} step"] * 3]
    assert log[:4] == turn and log[12:16] == turn


def test_warm_up_is_not_measured(contest: Contest) -> None:
    log: list[str] = []
    three(contest, log)
    rows = contest.measure(DECODE, files(contest, DECODE), rounds=2, warmup=3)
    assert [r.contestant for r in rows] == [ENGINE, EAGER, "other"]
    assert {r.samples for r in rows} == {2 * 3}
    assert sum(line == f"{ENGINE} step" for line in log) == (2 + 3) * 3


def test_short_runs_are_repeated_equally_often_for_everybody(contest: Contest) -> None:
    log: list[str] = []
    three(contest, log)
    rows = contest.measure(SHORT, files(contest, SHORT), rounds=2, warmup=1)
    assert len({r.samples for r in rows}) == 1
    assert rows[0].samples > 2
    assert all(0 < r.min_ms <= r.p50_ms <= r.p95_ms <= r.p99_ms for r in rows)
    assert rows[0].tokens_per_s == pytest.approx(4 / rows[0].p50_ms * 1e3)


def test_right_numbers_are_found_right(contest: Contest) -> None:
    three(contest, [])
    assert {name: s.ok for name, s in sanities(contest).items()} == {ENGINE: True, EAGER: True, "other": True}


@pytest.mark.parametrize("factor", [2.0, 0.0, -1.0, 1.01])
def test_wrong_numbers_are_flagged(contest: Contest, factor: float) -> None:
    three(contest, [], factor=factor)
    found = sanities(contest)
    assert found["other"].ok is False and "against eager" in found["other"].note
    assert found[ENGINE].ok is True


def test_an_error_within_the_tolerance_is_accepted(contest: Contest) -> None:
    three(contest, [], factor=1.0 + 1e-5)
    other = sanities(contest)["other"]
    assert other.ok is True and other.max_error is not None and 0 < other.max_error < 1e-3


def test_numbers_that_go_wrong_in_long_runs_only_are_flagged(contest: Contest) -> None:
    three(contest, [], wrong_from=10)
    assert sanities(contest)["other"].ok is True
    contest.measure(SHORT, files(contest, SHORT), rounds=1, warmup=0)
    assert sanities(contest)["other"].ok is True
    contest.measure(LONG, files(contest, LONG), rounds=1, warmup=0)
    other = sanities(contest)["other"]
    assert other.ok is False and other.note.startswith("in prefill 1x16: error")


def test_not_a_number_is_flagged(contest: Contest) -> None:
    enter(contest, EAGER, CountingRunner(EAGER, []))
    enter(contest, "other", NaNRunner("other", []))
    contest.judge()
    assert sanities(contest)["other"].ok is False
    assert "not finite" in sanities(contest)["other"].note


def test_an_engine_in_a_smaller_dtype_is_reported_and_not_judged() -> None:
    with Contest("bfloat16", NullProgress()) as contest:
        ids = np.arange(8, dtype=np.int64)[None]
        contest.write("check", {"input_ids": ids[:, :5], "next_ids": ids[:, 5:]})
        enter(contest, ENGINE, CountingRunner(ENGINE, [], factor=1.1))
        enter(contest, EAGER, CountingRunner(EAGER, []))
        contest.judge()
        engine = sanities(contest)[ENGINE]
        assert engine.ok is None and engine.max_error is not None and engine.max_error > 0.1
        assert "verify" in engine.note


def test_without_eager_nobody_is_judged(contest: Contest) -> None:
    enter(contest, ENGINE, CountingRunner(ENGINE, []))
    contest.judge()
    assert sanities(contest)[ENGINE].ok is None
    assert "nothing to compare with" in sanities(contest)[ENGINE].note


def test_who_cannot_load_is_skipped_with_the_reason(contest: Contest) -> None:
    assert enter(contest, ENGINE, CountingRunner(ENGINE, []))
    assert not enter(contest, "other", ShyRunner("other", []))
    assert [(s.contestant, s.workload, s.reason) for s in contest.skipped] == [
        ("other", "", "it does not want to")
    ]
    assert [e.info.name for e in contest.entries] == [ENGINE]


def test_who_breaks_in_a_workload_is_skipped_there_and_runs_elsewhere(contest: Contest) -> None:
    enter(contest, ENGINE, CountingRunner(ENGINE, []))
    enter(contest, "other", FragileRunner("other", []))
    broken = contest.measure(LONG, files(contest, LONG), rounds=2, warmup=1)
    assert [r.contestant for r in broken] == [ENGINE]
    assert [(s.contestant, s.workload, s.reason) for s in contest.skipped] == [
        ("other", "prefill 1x16", "RuntimeError: out of breath")
    ]
    assert [r.contestant for r in contest.measure(SHORT, files(contest, SHORT), 1, 0)] == [ENGINE, "other"]


def test_an_engine_that_breaks_is_an_error_not_a_skip(contest: Contest) -> None:
    with pytest.raises(BundleError, match="the engine could not be measured: it does not want to"):
        enter(contest, ENGINE, ShyRunner(ENGINE, []))
    enter(contest, ENGINE, FragileRunner(ENGINE, []))
    with pytest.raises(BundleError, match="out of breath"):
        contest.measure(LONG, files(contest, LONG), rounds=1, warmup=0)


def test_another_model_does_not_take_part(contest: Contest) -> None:
    class Hashed(CountingRunner):
        def load(self) -> dict[str, Any]:
            return {**super().load(), "source_hash": "b" * 64}

    assert enter(contest, "same", Hashed("same", []), source_hash="b" * 64)
    assert not enter(contest, "other", Hashed("other", []), source_hash="a" * 64)
    assert "not the model this bundle was built from" in contest.skipped[0].reason


def test_forced_routing_reaches_the_runner_and_ends(contest: Contest, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Spy(CountingRunner):
        def prefill(self, ids: Any) -> Any:
            seen.append(self.forced)
            return super().prefill(ids)

    runner = Spy(ENGINE, [])
    enter(contest, ENGINE, runner)
    routing = [(np.array([[0, 1]], np.int32), np.array([[0.5, 0.5]], np.float32))]
    write_routing(tmp_path / "forced.npz", routing)
    workload = dataclasses.replace(SHORT, routing="zipf")
    plan = dataclasses.replace(files(contest, SHORT), forced=str(tmp_path / "forced.npz"))
    seen.clear()
    contest.measure(workload, plan, rounds=1, warmup=0)
    assert seen and all((forced[0][0] == routing[0][0]).all() for forced in seen)
    assert runner.forced is None


def test_comparing_check_files(tmp_path: Path) -> None:
    logits = np.linspace(-3, 3, 12, dtype=np.float32).reshape(1, 3, 4)
    good, shorter, missing = tmp_path / "good.npz", tmp_path / "shorter.npz", tmp_path / "missing.npz"
    np.savez(good, prefill=logits, step0=logits[:, :1])
    np.savez(shorter, prefill=logits[:, :2], step0=logits[:, :1])
    np.savez(missing, prefill=logits)
    assert compare_check(good, good, False, True, "float32").ok is True
    assert "shape [1, 2, 4]" in compare_check(shorter, good, False, True, "float32").note
    assert "step0" in compare_check(missing, good, False, True, "float32").note
    assert compare_check(missing, good, False, True, "float32").ok is False


def test_comparing_samples() -> None:
    assert compare_sample([1.0, 2.0], [1.0, 2.01]) == ""
    assert "error" in compare_sample([1.0, 2.0], [1.0, 3.0])
    assert "error" in compare_sample([2.0, 1.0], [1.0, 2.0])
    assert "not finite" in compare_sample([float("nan"), 2.0], [1.0, 2.0])
    assert "numbers" in compare_sample([1.0], [1.0, 2.0])
