"""Greedy, temperature, top-k and nucleus sampling against the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_export.errors import BundleError, InputError
from moe_export.runtime.sampling import Sampler, Sampling, largest


def _candidates(logits: Any, **options: Any) -> dict[int, float]:
    ids, shares = Sampler(Sampling(temperature=1.0, **options), 1).candidates(np.array(logits, np.float32))
    return dict(zip(ids.tolist(), shares.tolist(), strict=True))


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    assert Sampler(Sampling(), 1).choose(np.array([0.0, 3.0, 3.0, -np.inf], np.float32), 0) == 1


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [1.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(bad: list[float], temperature: float) -> None:
    with pytest.raises(BundleError, match="sequence 0"):
        Sampler(Sampling(temperature=temperature), 1).choose(np.array(bad, np.float32), 0)


def test_top_k_keeps_k_with_the_lower_id_first() -> None:
    assert set(_candidates([1, 5, 5, 5, 0], top_k=2)) == {1, 2}
    assert _candidates([0, 0], top_k=1) == {0: 1.0}
    assert len(_candidates([0.0] * 7, top_k=50)) == 7


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(_candidates(logits, top_p=0.5)) == {0}
    assert set(_candidates(logits, top_p=0.51)) == {0, 1}
    assert set(_candidates(logits, top_p=0.79)) == {0, 1}
    assert set(_candidates(logits, top_p=0.94)) == {0, 1, 2}
    assert set(_candidates(logits, top_p=1.0)) == {0, 1, 2, 3}
    assert set(_candidates(logits, top_p=1e-9)) == {0}
    kept = _candidates(logits, top_p=0.79)
    assert kept[0] == pytest.approx(0.5 / 0.8) and kept[1] == pytest.approx(0.3 / 0.8)


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the two kept by top_k, the first alone holds 4/7.
    assert set(_candidates(logits, top_k=2, top_p=0.55)) == {0}
    assert set(_candidates(logits, top_k=2, top_p=0.6)) == {0, 1}


def test_top_p_over_a_large_flat_vocabulary() -> None:
    assert sorted(_candidates(np.zeros(5000), top_p=0.5)) == list(range(2500))


def test_drawn_shares_follow_the_probabilities() -> None:
    shares = np.array([0.5, 0.3, 0.2])
    sampler = Sampler(Sampling(temperature=1.0, seed=3), 1)
    drawn = np.bincount([sampler.choose(np.log(shares).astype(np.float32), 0) for _ in range(6000)]) / 6000
    np.testing.assert_allclose(drawn, shares, atol=0.03)
    cold = Sampler(Sampling(temperature=0.5, seed=3), 1)
    drawn = np.bincount([cold.choose(np.log(shares).astype(np.float32), 0) for _ in range(6000)]) / 6000
    np.testing.assert_allclose(drawn, shares**2 / (shares**2).sum(), atol=0.03)


def test_a_sequence_draws_the_same_whatever_else_is_in_the_batch() -> None:
    logits = np.zeros(1000, np.float32)
    alone, many = (Sampler(Sampling(temperature=1.0, seed=7), n) for n in (1, 3))
    first = [alone.choose(logits, 0) for _ in range(20)]
    mixed = [[many.choose(logits, s) for s in range(3)] for _ in range(20)]
    assert [row[0] for row in mixed] == first
    assert [row[1] for row in mixed] != first
    assert [Sampler(Sampling(temperature=1.0, seed=8), 1).choose(logits, 0) for _ in range(20)] != first


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 1, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1, "top_k": 2.0}, "top_k is 2.0"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0"),
        ({"temperature": 1, "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 1, "seed": -1}, "seed is -1"),
        ({"top_k": 4}, "top_k has no effect with temperature 0"),
        ({"top_p": 0.5}, "top_p has no effect with temperature 0"),
    ],
)
def test_wrong_settings(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Sampling(**options)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 45))
def test_largest_is_a_stable_sort_cut_off(values: list[int], count: int) -> None:
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert largest(np.array(values, np.float64), count).tolist() == want
