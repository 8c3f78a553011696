"""Progress on stderr: bars on a terminal, one plain line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from moe_export.progress import NullProgress, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars


@contextmanager
def console_progress(quiet: bool = False, stream: TextIO | None = None) -> Iterator[Progress]:
    """A :class:`Progress` that fits ``stream`` (stderr): nothing, bars, or lines."""
    out = stream or sys.stderr
    if quiet:
        yield NullProgress()
    elif out.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
        )
        with Bars(*columns, console=Console(file=out)) as bars:
            yield BarProgress(bars)
    else:
        yield LineProgress(out)


class LineProgress:
    """``stage ...`` when a stage starts, ``stage: done in 2.1 s`` when it ends after a second or more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        start = time.monotonic()
        self._line(f"{name} ...")
        yield lambda _units: None
        seconds = time.monotonic() - start
        if seconds >= 1:
            self._line(f"{name}: done in {seconds:.1f} s")

    def note(self, text: str) -> None:
        self._line(f"note: {text}")


class BarProgress:
    """One bar per stage; a stage without a total pulses until it ends."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        task = self._bars.add_task(name, total=total)
        yield lambda units: self._bars.advance(task, units)
        self._bars.update(task, total=total or 1, completed=total or 1)

    def note(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", markup=False, highlight=False)
