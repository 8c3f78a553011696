"""The engine of a bundle of several ranks as a contestant: this process is rank 0, ``mpiexec`` started the
others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .engine_runner import EngineRunner
from .process import Failed, first_line
from .runner import Host

if TYPE_CHECKING:
    from ..runtime.ranked import RankUse

MEMORY_NOTE = (
    "the engine's peak RSS is that of the largest rank but rank 0, whose process also runs the benchmark"
)


class RankSeat:
    """Runs rank 0's part here; the other ranks do theirs in their own processes."""

    def __init__(self, bundle: str, threads: int | None) -> None:
        """``threads``: of each rank; None: this host's cores divided by its ranks."""
        self._runner = EngineRunner(bundle, threads)
        self._host = Host(self._runner)
        self._pids: tuple[int, ...] = (os.getpid(),)

    @property
    def pids(self) -> tuple[int, ...]:
        """The ranks' processes on this host."""
        return self._pids

    def call(self, op: str, timeout: float, **values: Any) -> dict[str, Any]:
        """As :meth:`Seat.call`. The ranks' own time limit holds, not ``timeout``."""
        try:
            if op == "memory":
                peaks = [use.peak_rss or 0 for use in self.use() if use.rank]
                return {"peak_rss": max(peaks, default=0) or None}
            answer = self._host.handle({"op": op, **values})
            if op == "load":
                uses = self.use()
                self._pids = tuple(use.pid for use in uses if use.host == uses[0].host)
                answer = {**answer, "notes": list(self._runner.session.notes)}
            return answer
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            raise Failed(first_line(error)) from error

    def use(self) -> tuple[RankUse, ...]:
        """What each rank did so far."""
        read = self._runner.session.rank_use
        return () if read is None else read()

    def notes(self) -> list[str]:
        """One line per rank on its time and what it exchanged."""
        return [f"engine: {self._runner.session.rank_note}", MEMORY_NOTE, *(_text(u) for u in self.use())]

    def close(self) -> None:
        self._runner.close()


def _text(use: RankUse) -> str:
    text = f"rank {use.rank} ({use.host}): {use.runs} runs, {use.seconds:.2f} s in its graphs"
    for op, title in (("all_reduce", "AllReduce"), ("all_to_all", "AllToAll")):
        calls = use.exchange.get(f"{op}_calls", 0)
        if calls:
            text += (
                f"; {title}: {calls:.0f} times, {use.exchange[f'{op}_bytes'] / 1e6:.2f} MB, "
                f"{use.exchange[f'{op}_seconds']:.2f} s, waiting for other ranks included"
            )
    return text
