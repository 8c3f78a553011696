"""The contest itself: contestants get ready one by one, then take turns on every workload."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import BundleError, MoeExportError
from ..progress import Progress
from .grid import Workload
from .machine import NOISY_CORES, LoadMeter
from .process import Failed, Seat
from .result import EAGER, ENGINE, Contestant, Row, Sanity, Skipped
from .runner import NotPossible
from .sanity import compare_check, compare_sample
from .stats import summarize

LOAD_SECONDS, RUN_SECONDS = 1800.0, 1800.0
VISIT_SECONDS, MOST_REPEATS = 0.3, 10
"""A contestant's turn repeats short runs up to about this long, so that its caches are its own again."""
SETTLE_SECONDS = 0.02
"""Pause between turns: thread pools of the one before spin a little before they sleep."""


@dataclass
class Entry:
    """A contestant that is loaded and checked."""

    info: Contestant
    seat: Seat
    first_seconds: float


@dataclass(frozen=True)
class WorkloadFiles:
    """Where the inputs of a workload lie, and its forced routing (empty: the model's own)."""

    inputs: Path
    forced: str = ""


class Contest:
    """Holds the contestants in their order of turns. A context manager that ends their processes."""

    def __init__(self, dtype: str, progress: Progress) -> None:
        """``dtype``: of the engine; only a float32 engine's numbers are judged here."""
        self._dtype = dtype
        self.progress = progress
        self.entries: list[Entry] = []
        self.skipped: list[Skipped] = []
        self.load = LoadMeter(self.pids)
        self._folder = tempfile.TemporaryDirectory(prefix="moe-export-bench-")
        self.folder = Path(self._folder.name)
        self.check_inputs = self.folder / "check.npz"

    def __enter__(self) -> Contest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for entry in self.entries:
            entry.seat.close()
        self._folder.cleanup()

    def pids(self) -> list[int]:
        """Processes of the benchmark, this one included."""
        return sorted({os.getpid(), *(pid for entry in self.entries for pid in entry.seat.pids)})

    def write(self, name: str, arrays: dict[str, Any]) -> Path:
        """Write arrays into the contest's folder; returns the file."""
        import numpy as np

        path = self.folder / f"{name}.npz"
        np.savez(path, **arrays)
        return path

    def enter(
        self,
        name: str,
        title: str,
        make_seat: Callable[[], Seat],
        *,
        first_seconds: float = RUN_SECONDS,
        source_hash: str | None = None,
        prepare_s: float | None = None,
    ) -> bool:
        """Load a contestant and run the sanity check's inputs, already written as ``check``.

        ``source_hash``: what its source must hash to. Returns whether it takes part; else it is in
        ``skipped``.

        Raises:
            MoeExportError: the engine cannot be loaded or run.
        """
        seat: Seat | None = None
        try:
            with self.progress.stage(f"load {name}"):
                seat = make_seat()
                found = seat.call("load", LOAD_SECONDS)
                other = found.get("source_hash")
                if source_hash is not None and other is not None and other != source_hash:
                    raise NotPossible(
                        "the source is not the model this bundle was built from "
                        f"(hash {other[:12]}…, the bundle's is {source_hash[:12]}…)"
                    )
                output = self.folder / f"check-{name}.npz"
                first = seat.call("check", first_seconds, inputs=str(self.check_inputs), output=str(output))
        except (NotPossible, Failed, MoeExportError) as error:
            if seat is not None:
                seat.close()
            if name == ENGINE:
                raise _engine_error(error) from error
            self.skip(name, str(error))
            return False
        info = Contestant(
            name=name, title=title, sanity=Sanity(None), load_s=found["seconds"], prepare_s=prepare_s,
            first_run_s=first["seconds"], notes=tuple(found.get("notes", ())),
        )  # fmt: skip
        self.entries.append(Entry(info, seat, first_seconds))
        return True

    def skip(self, name: str, reason: str, workload: str = "") -> None:
        """Record what is not measured."""
        self.skipped.append(Skipped(name, reason, workload))
        self.progress.note(f"{name}{f', {workload}' if workload else ''} skipped: {reason}")

    def judge(self) -> None:
        """Compare everybody's check results with eager's."""
        eager = self.folder / f"check-{EAGER}.npz"
        for entry in self.entries:
            own = self.folder / f"check-{entry.info.name}.npz"
            judged = entry.info.name != ENGINE or self._dtype == "float32"
            sanity = compare_check(
                own, eager if self._entry(EAGER) else None, entry.info.name == EAGER, judged, self._dtype
            )
            entry.info = dataclasses.replace(entry.info, sanity=sanity)
            if sanity.ok is False:
                self.progress.note(f"{entry.info.name}: wrong numbers: {sanity.note}")

    def measure(self, workload: Workload, files: WorkloadFiles, rounds: int, warmup: int) -> list[Row]:
        """Times of every contestant, taken in turns: A B C, A B C, ... ``rounds`` times after ``warmup``
        rounds.

        Raises:
            MoeExportError: the engine failed.
        """
        meter = LoadMeter(self.pids)
        seconds: dict[str, list[float]] = {}
        samples: dict[str, list[float]] = {}
        running = list(self.entries)
        slowest = VISIT_SECONDS
        total = (rounds + warmup) * len(running)
        with self.progress.stage(f"measure {workload.text}", total) as advance:
            for turn in range(-warmup, rounds):
                repeats = 1
                if workload.phase != "decode" and turn >= 0 and warmup:
                    repeats = max(1, min(MOST_REPEATS, int(VISIT_SECONDS / max(slowest, 1e-6))))
                times: list[float] = []
                for entry in list(running):
                    name = entry.info.name
                    answer = self._visit(entry, workload, files, repeats, meter if turn >= 0 else None)
                    advance(1)
                    if answer is None:
                        running.remove(entry)
                        seconds.pop(name, None)
                        continue
                    times.append(max(answer["seconds"]))
                    samples[name] = answer["sample"]
                    if turn >= 0:
                        seconds.setdefault(name, []).extend(answer["seconds"])
                slowest = max(times)
        self._compare_samples(workload, samples)
        self.load.add(meter)
        return [_row(name, workload, found, meter) for name, found in seconds.items()]

    def _visit(
        self, entry: Entry, workload: Workload, files: WorkloadFiles, repeats: int, meter: LoadMeter | None
    ) -> dict[str, Any] | None:
        """One turn of one contestant, or None if it cannot."""
        time.sleep(SETTLE_SECONDS)
        window = meter.start() if meter is not None else None
        try:
            return entry.seat.call(
                "measure", max(entry.first_seconds, RUN_SECONDS if meter is not None else 0.0),
                phase=workload.phase, inputs=str(files.inputs), repeats=repeats, forced=files.forced,
            )  # fmt: skip
        except (NotPossible, Failed, MoeExportError) as error:
            if entry.info.name == ENGINE and not isinstance(error, NotPossible):
                raise _engine_error(error) from error
            self.skip(entry.info.name, str(error), workload.text)
            return None
        finally:
            if meter is not None:
                meter.stop(window)

    def _compare_samples(self, workload: Workload, samples: dict[str, list[float]]) -> None:
        """Whether the very runs that were timed computed what eager computed."""
        expected = samples.get(EAGER)
        if expected is None:
            return
        for entry in self.entries:
            name = entry.info.name
            if name in samples and name != EAGER and (name != ENGINE or self._dtype == "float32"):
                fault = compare_sample(samples[name], expected)
                if fault and entry.info.sanity.ok is not False:
                    note = f"in {workload.text}: {fault}"
                    entry.info = dataclasses.replace(
                        entry.info, sanity=dataclasses.replace(entry.info.sanity, ok=False, note=note)
                    )
                    self.progress.note(f"{name}: wrong numbers {note}")

    def note_memory(self) -> None:
        """Read everybody's peak memory so far."""
        for entry in self.entries:
            try:
                peak = entry.seat.call("memory", RUN_SECONDS)["peak_rss"]
            except Failed:
                continue
            entry.info = dataclasses.replace(entry.info, peak_rss=peak)

    def _entry(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.info.name == name), None)

    def engine(self) -> Entry:
        """The engine's entry."""
        return next(e for e in self.entries if e.info.name == ENGINE)


def _row(name: str, workload: Workload, seconds: list[float], meter: LoadMeter) -> Row:
    summary = summarize(seconds)
    foreign = meter.foreign_cores
    return Row(
        contestant=name, phase=workload.phase, batch=workload.batch, sequence=workload.sequence,
        routing=workload.routing, samples=summary.samples, p50_ms=summary.p50_ms, p95_ms=summary.p95_ms,
        p99_ms=summary.p99_ms, mean_ms=summary.mean_ms, min_ms=summary.min_ms,
        tokens_per_s=workload.tokens / summary.p50_ms * 1e3 if summary.p50_ms else 0.0,
        foreign_cores=foreign, noisy=foreign is not None and foreign > NOISY_CORES,
    )  # fmt: skip


def _engine_error(error: Exception) -> MoeExportError:
    if isinstance(error, MoeExportError):
        return error
    return BundleError(f"the engine could not be measured: {error}")
