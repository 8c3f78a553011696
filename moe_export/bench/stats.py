"""Medians, percentiles and means of measured times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q``-th percentile (0 to 100) with linear interpolation between the two nearest samples.

    Raises:
        ValueError: no values, or ``q`` outside 0..100.
    """
    if not values:
        raise ValueError("percentile of no values")
    if not 0.0 <= q <= 100.0:
        raise ValueError(f"percentile {q} is outside 0..100")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100.0
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Summary:
    """Statistics of one series of times, in milliseconds.

    With few samples the high percentiles lie between the two slowest: read them together with ``samples``.
    """

    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float


def summarize(seconds: Sequence[float]) -> Summary:
    """Statistics over ``seconds``.

    Raises:
        ValueError: no values, or one that is not a time (negative, NaN, infinite).
    """
    for value in seconds:
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{value!r} is not a time")
    p50, p95, p99 = (percentile(seconds, q) * 1e3 for q in (50, 95, 99))
    return Summary(
        samples=len(seconds),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        mean_ms=math.fsum(seconds) / len(seconds) * 1e3,
        min_ms=min(seconds) * 1e3,
    )


def geometric_mean(values: Iterable[float]) -> float | None:
    """Geometric mean of positive ``values``; None when there is none."""
    logs = [math.log(v) for v in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None
