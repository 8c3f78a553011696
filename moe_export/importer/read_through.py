"""A checkpoint's two full reads, for its hash and for NaN and infinite weights, at the same time.

A large checkpoint comes from the disk once that way: the second reader finds in the page cache what the first
one has read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ..progress import NullProgress, Progress
from .checkpoint import check_finite, file_digests


def read_through(folder: str | Path, progress: Progress | None = None) -> dict[str, tuple[int, str]]:
    """:func:`~moe_export.importer.checkpoint.check_finite`, and the result of
    :func:`~moe_export.importer.checkpoint.file_digests`.

    ``progress`` shows the hashing, which takes longer. What fails in one reader ends the other.

    Raises:
        SourceError: as they do.
    """
    stop = threading.Event()

    def stopped() -> None:
        if stop.is_set():
            raise _Stopped

    with ThreadPoolExecutor(max_workers=1) as pool:
        finite = pool.submit(check_finite, folder, _Checking(NullProgress(), stopped))

        def failed() -> None:
            if finite.done():
                finite.result()

        try:
            digests = file_digests(folder, _Checking(progress or NullProgress(), failed))
            finite.result()
            return digests
        finally:
            stop.set()


class _Stopped(Exception):
    """The other reader failed."""


class _Checking:
    """Progress that calls ``check``, which may raise, with every step."""

    def __init__(self, inner: Progress, check: Callable[[], None]) -> None:
        self._inner, self._check = inner, check

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        with self._inner.stage(name, total) as advance:

            def step(count: int) -> None:
                self._check()
                advance(count)

            yield step

    def note(self, text: str) -> None:
        self._inner.note(text)
