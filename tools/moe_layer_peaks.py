"""How fast this machine is right now, and turns of a contestant that others hardly disturb."""

from __future__ import annotations

import os
import resource
import statistics
import time
from typing import Any

import numpy as np
from moe_layer import Run

from moe_export.bench.machine import NOISY_CORES, LoadMeter

MIN_SECONDS = 0.02
"""A contestant's turn lasts at least this long, after one call that does not count."""
LONG_SECONDS = 0.2
"""A call that takes longer is a turn of its own: its caches hold nothing of the call before."""
PAUSE_SECONDS = 0.1
"""Between turns: the threads of the last contestant spin for a while before they sleep."""
QUIET_SWITCHES = 60.0
"""Involuntary context switches per second up to which a turn counts as undisturbed."""
MOST_SECONDS = 1.0
"""A turn is tried again only while all its tries took less."""
READ_BYTES = 512 * 2**20
SGEMM_SIZE = 1536


def turn_seconds(
    run: Run,
    tries: int = 10,
    meter: LoadMeter | None = None,
    least: float = MIN_SECONDS,
    pause: float = PAUSE_SECONDS,
) -> float:
    """Median seconds of the calls of one turn, of the first turn that other processes hardly disturbed.

    Where none of ``tries`` turns was quiet, the least disturbed one. ``meter`` watches the turns. A turn
    lasts ``least`` seconds or more and begins after ``pause``.
    """
    best = (float("inf"), float("inf"))
    time.sleep(pause)
    window = meter.start() if meter is not None else None
    first = time.perf_counter()
    for _ in range(tries):
        before = _switches()
        begin = time.perf_counter()
        run()
        times = [time.perf_counter() - begin]
        if times[0] < LONG_SECONDS:
            times, before = [], _switches()
            while sum(times) < least:
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
        best = min(best, ((_switches() - before) / sum(times), statistics.median(times)))
        if best[0] <= QUIET_SWITCHES or time.perf_counter() - first > MOST_SECONDS:
            break
    if meter is not None:
        meter.stop(window)
    return best[1]


def _switches() -> int:
    """How often the system took a core away from this process's threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def own_load() -> LoadMeter:
    """A meter of what other processes than this one use."""
    return LoadMeter(lambda: [os.getpid()])


def wait_for_quiet(limit: float) -> None:
    """Return when other processes have left the cores alone for a moment, or after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        meter = own_load()
        window = meter.start()
        time.sleep(1.0)
        meter.stop(window)
        if (meter.foreign_cores or 0.0) < NOISY_CORES / 2:
            return


class Peaks:
    """How fast this machine reads memory (GB/s) and multiplies float32 matrices (GFLOP/s), with ``threads``.

    Reading: torch's sum over an array far larger than the caches. Multiplying: the better of torch's (MKL or
    oneDNN) and NumPy's (OpenBLAS) product of large square matrices.
    """

    def __init__(self, threads: int, tries: int) -> None:
        import torch

        self.threads = threads
        self.tries = tries
        self._data = torch.ones(READ_BYTES // 4)
        a = torch.randn(SGEMM_SIZE, SGEMM_SIZE)
        self._products: list[Run] = [lambda: torch.mm(a, a), lambda: np.matmul(a.numpy(), a.numpy())]
        self.begin()

    def begin(self) -> None:
        self._reads: list[float] = []
        self._multiplies: list[list[float]] = [[] for _ in self._products]

    def measure(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        self._reads.append(READ_BYTES / turn_seconds(self._data.sum, self.tries) / 1e9)
        for product, rates in zip(self._products, self._multiplies, strict=True):
            rates.append(2 * SGEMM_SIZE**3 / turn_seconds(product, self.tries) / 1e9)

    def snapshot(self) -> tuple[float, float]:
        """GB/s read and GFLOP/s multiplied since :meth:`begin`, medians."""
        multiplied: Any = max(statistics.median(rates) for rates in self._multiplies)
        return statistics.median(self._reads), float(multiplied)
