"""How many tokens the fullest expert gets: what buckets of one size for all experts must hold.

Uniform choice is assumed; real routers are more skewed, which :data:`SKEW` allows for. A bucket that turns
out too small costs one more run, never a wrong result.
"""

from __future__ import annotations

import math

SKEW = 2.0
"""Tokens of the fullest expert over what uniform choice predicts, that a first guess allows for."""
GRAIN = 16
"""Buckets are multiples of it: the rows of a tensor-core tile."""


def uniform_load(tokens: int, top_k: int, experts: int) -> float:
    """Expected tokens of the fullest expert when each token chooses ``top_k`` of ``experts`` evenly.

    mean + sqrt(2 mean ln E), the bound for the largest of E Poisson variables; never more than ``tokens``.
    """
    mean = tokens * top_k / experts
    return min(float(tokens), mean + math.sqrt(2.0 * mean * math.log(max(experts, 2))))


def round_up(rows: float, most: int) -> int:
    """``rows`` as a bucket: a multiple of :data:`GRAIN`, 1 or more, at most ``most``."""
    return max(1, min(most, GRAIN * math.ceil(rows / GRAIN)))


def first_guess(tokens: int, top_k: int, experts: int) -> int:
    """Rows per bucket to begin with."""
    return round_up(SKEW * uniform_load(tokens, top_k, experts), max(tokens, 1))

