"""The machine a benchmark ran on, and how much of it other processes used meanwhile."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOISY_CORES = 0.25
"""Times measured while other processes use more than this many cores are called noisy."""


@dataclass(frozen=True)
class Machine:
    """Where a benchmark ran. ``cores_usable``: logical cores this process may use; ``threads``: per
    contestant.

    ``foreign_cores``: mean number of cores that processes outside the benchmark kept busy while times were
    taken (None where the system does not tell); ``load_before``: 1-minute load average before it began.
    """

    cpu: str
    architecture: str
    system: str
    cores_physical: int | None
    cores_logical: int
    cores_usable: int
    threads: int
    memory_bytes: int
    foreign_cores: float | None = None
    load_before: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        """Whether other processes used more than :data:`NOISY_CORES`."""
        return self.foreign_cores is not None and self.foreign_cores > NOISY_CORES


def describe_machine(threads: int) -> Machine:
    """This machine, before anything is measured."""
    import psutil

    from moe_export.bundle.tools import tool_versions

    return Machine(
        cpu=_cpu_model(),
        architecture=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        cores_physical=psutil.cpu_count(logical=False),
        cores_logical=psutil.cpu_count() or 1,
        cores_usable=usable_cores(),
        threads=threads,
        memory_bytes=int(psutil.virtual_memory().total),
        load_before=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        versions=tool_versions(),
    )


def usable_cores() -> int:
    """Logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # Not Linux: the platform module's name has to do.
    return platform.processor() or platform.machine() or "unknown"


@dataclass
class _Window:
    busy: float
    own: float
    wall: float


class LoadMeter:
    """Measures how many cores processes outside the benchmark keep busy during chosen windows.

    Foreign time = busy time of all cores − CPU time of our own processes. Windows add up, because the system
    counts in steps of 10 ms and one short window alone would say little.
    """

    def __init__(self, own_pids: Callable[[], Iterable[int]]) -> None:
        """``own_pids``: the processes that belong to the benchmark now."""
        self._own_pids = own_pids
        self._busy = 0.0
        self._wall = 0.0

    def start(self) -> Any:
        """Begin a window; hand the value to :meth:`stop`."""
        return _Window(_busy_seconds(), self._own_seconds(), time.monotonic())

    def stop(self, window: Any) -> None:
        """End a window and add it."""
        own = self._own_seconds() - window.own
        self._busy += max(_busy_seconds() - window.busy - own, 0.0)
        self._wall += time.monotonic() - window.wall

    @property
    def foreign_cores(self) -> float | None:
        """Mean over all windows; None before half a second has been watched."""
        return round(self._busy / self._wall, 3) if self._wall >= 0.5 else None

    def add(self, other: LoadMeter) -> None:
        """Add the windows of ``other``."""
        self._busy += other._busy
        self._wall += other._wall

    def _own_seconds(self) -> float:
        import psutil

        total = 0.0
        for pid in self._own_pids():
            try:
                times = psutil.Process(pid).cpu_times()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            total += times.user + times.system
        return total


def _busy_seconds() -> float:
    """CPU seconds that all cores spent not idle, since boot; time stolen by other virtual machines counts."""
    import psutil

    times = psutil.cpu_times()
    # guest time is contained in user time.
    return float(
        sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    )
