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

    def touched(self, tokens: float) -> float:
        """Expected number of experts that at least one of ``tokens`` tokens chooses."""
        return sum(1 - (1 - chance) ** tokens for chance in self.chances)


@lru_cache(maxsize=256)
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

    chances = np.asarray(popularity.chances)
    if tokens * len(chances) > _EXACT or not 1 <= round(popularity.top_k) < len(chances):
        return np.random.default_rng(seed).binomial(tokens, chances, (samples, len(chances)))
    order = draw_tokens(popularity, samples * tokens, seed).reshape(samples, -1)
    counts = np.zeros((samples, len(chances)), np.int64)
    for sample in range(samples):
        counts[sample] = np.bincount(order[sample], minlength=len(chances))
    return counts


def rank_loads(
    counts: NDArray[np.int64], shares: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and used experts per rank, expected, each float64 [samples, ranks].

    ``shares`` [E, ranks]: what share of each expert's rows each rank computes. Where an expert has replicas,
    each row takes one of them at random.
    """
    import numpy as np

    used = np.stack([1.0 - (1.0 - shares) ** row[:, None] for row in counts.astype(np.float64)])
    return counts @ shares, used.sum(axis=1)


def draw_tokens(popularity: Popularity, tokens: int, seed: int = 0) -> NDArray[np.int64]:
    """Experts of ``tokens`` drawn tokens: int64 [tokens, K], none twice for a token."""
    import numpy as np

    chances, top_k = np.asarray(popularity.chances), round(popularity.top_k)
    if not 1 <= top_k < len(chances):
        return np.broadcast_to(np.arange(len(chances)), (tokens, len(chances)))
    with np.errstate(divide="ignore"):
        # Drawing without replacement is a race of exponential clocks: the K smallest win.
        clocks = np.random.default_rng(seed).exponential(size=(tokens, len(chances))) / -np.log1p(-chances)
    return np.argpartition(clocks, top_k - 1, axis=1)[:, :top_k]


def fullest_block(
    popularity: Popularity, shares: NDArray[np.float64], tokens: int, samples: int, seed: int = 0
) -> float:
    """Rows of the fullest block when each rank sends its ``tokens`` to the ranks that have their experts.

    A block is what one rank sends to one rank (itself included): each token once, however many of its experts
    are there. All blocks get the rows of the fullest. The mean of ``samples`` drawn batches.
    """
    import numpy as np

    chosen = draw_tokens(popularity, 64 * samples, seed)
    visits = 1.0 - np.prod(1.0 - shares[chosen], axis=1).mean(axis=0)  # chance that a token goes to each rank
    ranks = len(visits)
    blocks = np.random.default_rng(seed).binomial(tokens, np.clip(visits, 0.0, 1.0), (samples, ranks, ranks))
    return float(blocks.max(axis=(1, 2)).mean())
