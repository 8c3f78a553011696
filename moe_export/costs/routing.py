"""Which experts tokens choose: popularity, and the load of experts and ranks that follows from it.

Tokens are taken as independent. A token never chooses an expert twice, so what matters is each expert's
chance of being among a token's K. From popularities (Zipf) it follows by drawing K without replacement:
chance = 1 - exp(-c * popularity), with c such that the chances sum to K.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from moe_export.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_EXACT = 1 << 16
"""Up to so many draws (tokens x experts) per sample, tokens draw their experts; above, experts their load."""


@dataclass(frozen=True)
class Popularity:
    """Chance of each expert to be among a token's choices. They sum to K (less where tokens were dropped)."""

    chances: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.chances or min(self.chances) < 0 or max(self.chances) > 1:
            raise UsageError("chances of experts: expected at least one, each from 0 to 1")

    @classmethod
    def uniform(cls, experts: int, top_k: int) -> Popularity:
        """All experts alike."""
        return cls((top_k / experts,) * experts)

    @classmethod
    def zipf(cls, experts: int, top_k: int, exponent: float, seed: int = 0) -> Popularity:
        """The r-th most popular expert is drawn in proportion to 1 / r^exponent; 0 is uniform.

        Which expert is the r-th is drawn by ``seed``, so that neighbours are not popular together.

        Raises:
            UsageError: a negative or infinite exponent.
        """
        if not math.isfinite(exponent) or exponent < 0:
            raise UsageError(f"the Zipf exponent is {exponent}; expected 0 or more, as in 1.0")
        weights = [(r + 1) ** -exponent for r in range(experts)]
        random.Random(seed).shuffle(weights)
        return cls(_chances(tuple(weights), top_k))

    @classmethod
    def from_counts(cls, counts: Sequence[int], tokens: int) -> Popularity:
        """From how often each expert was chosen by ``tokens`` tokens.

        Raises:
            UsageError: no tokens, or an expert chosen more often than there were tokens.
        """
        if tokens < 1 or not counts or min(counts) < 0 or max(counts) > tokens:
            raise UsageError("expert counts: expected from 0 to the number of tokens, and at least one token")
        return cls(tuple(count / tokens for count in counts))

    @property
    def top_k(self) -> float:
        """Choices per token."""
        return sum(self.chances)

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean: 1 = balanced."""
        return max(self.chances) * len(self.chances) / self.top_k if self.top_k else 0.0

    def placed_by_load(self, ranks: int) -> Popularity:
        """The same experts in another order: cut into ``ranks`` blocks, their loads are near even.

        Greedy: the most popular expert first, each to the least loaded rank that has a place left.
        """
        experts = len(self.chances)
        sizes = [(rank + 1) * experts // ranks - rank * experts // ranks for rank in range(ranks)]
        blocks: list[list[float]] = [[] for _ in range(ranks)]
        for chance in sorted(self.chances, reverse=True):
            free = [rank for rank in range(ranks) if len(blocks[rank]) < sizes[rank]]
            blocks[min(free, key=lambda rank: sum(blocks[rank]))].append(chance)
        return Popularity(tuple(chance for block in blocks for chance in block))

    def touched(self, tokens: float) -> float:
        """Expected number of experts that at least one of ``tokens`` tokens chooses."""
        return sum(1 - (1 - chance) ** tokens for chance in self.chances)


def _chances(weights: tuple[float, ...], top_k: int) -> tuple[float, ...]:
    if top_k >= len(weights):
        return (1.0,) * len(weights)
    low, high = 0.0, 1.0
    while sum(1 - math.exp(-high * w) for w in weights) < top_k:
        high *= 2
        if high > 1e300:
            raise UsageError(f"the Zipf exponent is so large that no {top_k} experts are ever chosen")
    for _ in range(200):
        middle = (low + high) / 2
        if sum(1 - math.exp(-middle * w) for w in weights) < top_k:
            low = middle
        else:
            high = middle
    return tuple(1 - math.exp(-high * w) for w in weights)


@lru_cache(maxsize=4096)
def sample_counts(popularity: Popularity, tokens: int, samples: int, seed: int = 0) -> NDArray[np.int64]:
    """Rows that each expert gets in ``samples`` batches of ``tokens`` tokens: int64 [samples, E].

    Few tokens: each one draws its K experts. Many: each expert's count is drawn on its own, so a batch's sum
    only is close to tokens x K. The result is cached: do not write to it.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    chances = np.asarray(popularity.chances)
    top_k = round(popularity.top_k)
    if tokens * len(chances) > _EXACT or not 1 <= top_k < len(chances):
        return rng.binomial(tokens, chances, (samples, len(chances)))
    with np.errstate(divide="ignore"):
        rates = -np.log1p(-chances)
        # Drawing without replacement is a race of exponential clocks: the K smallest win.
        clocks = rng.exponential(size=(samples, tokens, len(chances))) / rates
    order = np.argpartition(clocks, top_k - 1, axis=2)[:, :, :top_k]
    counts = np.zeros((samples, len(chances)), np.int64)
    for sample in range(samples):
        counts[sample] = np.bincount(order[sample].ravel(), minlength=len(chances))
    return counts


def rank_loads(counts: NDArray[np.int64], ranks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and used experts per rank, each int64 [samples, ranks]: contiguous blocks of experts.

    Raises:
        UsageError: more ranks than experts.
    """
    import numpy as np

    experts = counts.shape[1]
    if not 1 <= ranks <= experts:
        raise UsageError(f"{ranks} ranks for {experts} experts; expected 1 to {experts}")
    starts = [rank * experts // ranks for rank in range(ranks)]
    rows = np.add.reduceat(counts, starts, axis=1)
    used = np.add.reduceat((counts > 0).astype(np.int64), starts, axis=1)
    return rows, used
