"""Packs slots on ranks so that the busiest rank has little load, no rank holding an expert twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EMPTY = -1
_NEGLIGIBLE = 1e-12
"""Of the whole load: what rounding may make of two sums that are equal."""


def replicate(loads: NDArray[np.float64], slots: int, most: int) -> NDArray[np.int64]:
    """Slots of each expert, int64 [E], ``slots`` in all: one each, and the next always to the expert with
    most load per slot that has fewer than ``most``.
    """
    counts = np.ones(len(loads), np.int64)
    for _ in range(slots - len(loads)):
        counts[np.where(counts < most, loads / counts, -1.0).argmax()] += 1
    return counts


def pack(loads: NDArray[np.float64], counts: NDArray[np.int64], sizes: Sequence[int]) -> list[list[int]]:
    """Experts of each rank. ``counts[e]`` slots of expert e, each with ``loads[e] / counts[e]``, fill
    ``sizes[r]`` slots of rank r.

    Heaviest first, each to the least loaded rank with room that has not this expert; then slots of the
    busiest rank change places with lighter ones of others as long as that helps. Sizes must differ by one at
    most, must sum to the counts, and no count may be above the number of ranks.
    """
    packing = _Packing(loads / counts, sizes)
    each = np.repeat(np.arange(len(loads)), counts)
    for expert in each[np.lexsort((each, -packing.load[each]))]:
        packing.add(int(expert))
    while packing.improve():
        pass
    return packing.experts()


class _Packing:
    """Slots of ranks while they are filled: ``slot`` int64 [R, S] holds experts, :data:`EMPTY` where none."""

    def __init__(self, load: NDArray[np.float64], sizes: Sequence[int]) -> None:
        self.load = load
        self.sizes = np.array(sizes)
        self.slot = np.full((len(sizes), max(sizes)), EMPTY)
        self.total = np.zeros(len(sizes))
        self.used = np.zeros(len(sizes), np.int64)
        self.holds = np.zeros((len(sizes), len(load)), bool)

    def add(self, expert: int) -> None:
        """Give ``expert`` one more slot."""
        ranks = np.flatnonzero((self.used < self.sizes) & ~self.holds[:, expert])
        if len(ranks):
            self._put(int(ranks[self.total[ranks].argmin()]), expert)
        else:
            self._make_room(expert)

    def _put(self, rank: int, expert: int) -> None:
        self.slot[rank, self.used[rank]] = expert
        self.used[rank] += 1
        self.total[rank] += self.load[expert]
        self.holds[rank, expert] = True

    def _make_room(self, expert: int) -> None:
        """All ranks with room have ``expert``: another rank takes it and gives one of its own to them.

        There always is one to give: a full rank without ``expert`` has at least as many experts as the rank
        with room, of whose one is ``expert``, so that at least one of them is not there.
        """
        free = np.flatnonzero(self.used < self.sizes)
        best: tuple[float, int, int, int] | None = None
        for rank in np.flatnonzero(~self.holds[:, expert]):
            for place, other in enumerate(self.slot[rank, : self.used[rank]]):
                for to in free[~self.holds[free, other]]:
                    taken = self.total[rank] + self.load[expert] - self.load[other]
                    worst = max(taken, self.total[to] + self.load[other])
                    best = min(best or (np.inf, 0, 0, 0), (float(worst), int(rank), place, int(to)))
        assert best is not None  # by the argument above
        _, source, at, target = best
        given = int(self.slot[source, at])
        self._replace(source, at, expert)
        self._put(target, given)

    def _replace(self, rank: int, place: int, expert: int) -> None:
        """Slot ``place`` of ``rank`` holds ``expert`` (or nothing) from now on."""
        old = int(self.slot[rank, place])
        self.slot[rank, place] = expert
        for each, sign in ((old, -1), (expert, 1)):
            if each != EMPTY:
                self.total[rank] += sign * self.load[each]
                self.used[rank] += sign
                self.holds[rank, each] = sign > 0

    def improve(self) -> bool:
        """The one exchange with the busiest rank that lowers its load most for both; whether there was one.

        A rank with a slot less than others counts that slot as an expert without load.
        """
        top = int(self.total.argmax())
        load = np.append(self.load, 0.0)  # the last is EMPTY's
        gain = load[self.slot[top]][None, :, None] - load[self.slot][:, None, :]  # [R, S of top, S of other]
        gap = (self.total[top] - self.total)[:, None, None]
        negligible = _NEGLIGIBLE * self.total.sum()
        allowed = (gain > negligible) & (gain < gap - negligible)
        allowed &= ~self.holds[:, self.slot[top]][:, :, None]  # what leaves is not there yet
        allowed &= ~np.append(self.holds[top], (self.slot[top] == EMPTY).any())[self.slot][:, None, :]
        if not allowed.any():
            return False
        worst = np.where(allowed, np.maximum(-gain, gain - gap), np.inf)
        rank, mine, its = np.unravel_index(worst.argmin(), worst.shape)
        leaves, comes = int(self.slot[top, mine]), int(self.slot[rank, its])
        self._replace(top, int(mine), comes)
        self._replace(int(rank), int(its), leaves)
        return True

    def experts(self) -> list[list[int]]:
        """Experts of each rank, in their order."""
        return [sorted(int(e) for e in row if e != EMPTY) for row in self.slot]
