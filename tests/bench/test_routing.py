"""Forced routings and imbalance."""

from __future__ import annotations

import numpy as np
import pytest

from moe_export.bench.routing import force_all, forced_routing, imbalance
from moe_export.schema import MoELayer

LAYER = MoELayer(2, "layers.2", 16, 3, 8, 8, "h", "i", "w", "o")
TOKENS = 480


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one-hot"])
def test_ids_are_distinct_in_range_and_repeatable(kind: str) -> None:
    ids, weights = forced_routing(kind, LAYER, TOKENS, seed=5)
    assert ids.shape == weights.shape == (TOKENS, 3)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    assert ids.min() >= 0 and ids.max() < 16
    assert all(len(set(token)) == 3 for token in ids.tolist())
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(ids, forced_routing(kind, LAYER, TOKENS, seed=5)[0])


def test_uniform_is_balanced_and_one_hot_is_not() -> None:
    uniform, zipf, one_hot = (forced_routing(k, LAYER, TOKENS, 0)[0] for k in ("uniform", "zipf", "one-hot"))
    assert imbalance([uniform], [16]) == 1.0
    assert len(np.unique(one_hot)) == 3
    assert imbalance([one_hot], [16]) == pytest.approx(16 / 3)
    skew = imbalance([zipf], [16])
    assert skew is not None and 2.0 < skew < 16 / 3
    counts = np.sort(np.bincount(zipf.reshape(-1), minlength=16))[::-1]
    assert counts[0] > 2 * counts[5] > 0


def test_layers_have_different_favourites() -> None:
    layers = [MoELayer(i, str(i), 16, 1, 8, 8, "h", "i", "w", "o") for i in range(8)]
    favourites = {int(ids[0, 0]) for ids, _ in force_all("one-hot", layers, 4, seed=0)}
    assert len(favourites) > 2


def test_imbalance_ignores_dropped_tokens_and_empty_layers() -> None:
    ids = np.array([[0, -1], [0, -1], [1, -1], [0, -1]], np.int32)
    assert imbalance([ids], [4]) == pytest.approx(3 * 4 / 4)
    assert imbalance([np.full((2, 1), -1, np.int32)], [4]) is None
    assert imbalance([], []) is None


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'real' cannot be forced"):
        forced_routing("real", LAYER, 4, 0)
