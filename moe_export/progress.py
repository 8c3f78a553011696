"""How long work reports that it moves. The library never prints: a caller hands in a :class:`Progress`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives stages of work; :class:`NullProgress` ignores them, the command line draws them."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Enter a named stage. The value is called with the number of units finished since the last call."""
        ...

    def note(self, text: str) -> None:
        """One line worth telling the user now (a fallback, a cache hit)."""
        ...


class NullProgress:
    """Ignores everything."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield lambda _units: None

    def note(self, text: str) -> None:
        return None
