"""Percentiles, summaries and means of times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_export.bench.stats import geometric_mean, percentile, summarize

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50)


@given(TIMES, st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-12)


def test_percentile_of_known_values() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 50) == 2.5
    assert percentile(values, 0) == 1.0
    assert percentile(values, 100) == 4.0
    assert percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(("values", "q"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses_nonsense(values: list[float], q: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, q)


def test_summary_in_milliseconds() -> None:
    summary = summarize([0.001, 0.002, 0.003, 0.010])
    assert summary.samples == 4
    assert summary.p50_ms == pytest.approx(2.5)
    assert summary.p95_ms == pytest.approx(float(np.percentile([1, 2, 3, 10], 95)))
    assert summary.p99_ms == pytest.approx(float(np.percentile([1, 2, 3, 10], 99)))
    assert summary.mean_ms == pytest.approx(4.0)
    assert summary.min_ms == pytest.approx(1.0)
    assert summary.p50_ms <= summary.p95_ms <= summary.p99_ms


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_summary_refuses_what_is_not_a_time(bad: float) -> None:
    with pytest.raises(ValueError, match="not a time"):
        summarize([0.1, bad])


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None
