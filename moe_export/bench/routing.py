"""Routings that a benchmark forces on the experts, and how unbalanced a routing is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..schema import MoELayer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Routing = tuple[NDArray[np.int32], NDArray[np.float32]]

ROUTINGS: tuple[str, ...] = ("real", "uniform", "zipf", "one-hot")
"""``real``: the model's own. ``uniform``: every expert equally often. ``zipf``: expert at rank r with weight
1/r. ``one-hot``: the same K experts for every token."""


def forced_routing(kind: str, layer: MoELayer, tokens: int, seed: int) -> Routing:
    """Expert ids int32 [tokens, K], distinct per token, and weights float32 [tokens, K] of 1/K each.

    Which expert is the popular one differs from layer to layer.

    Raises:
        ValueError: ``kind`` is not one of :data:`ROUTINGS` besides ``real``.
    """
    import numpy as np

    experts, top_k = layer.num_experts, layer.top_k
    random = np.random.default_rng([seed, layer.index])
    names = random.permutation(experts)
    if kind == "uniform":
        # Deals the experts out in turn, so loads differ by one at most.
        places = np.arange(tokens * top_k).reshape(tokens, top_k) % experts
        places = places[random.permutation(tokens)]
    elif kind == "zipf":
        # Gumbel top-k: K distinct experts drawn one after another with probabilities 1/rank.
        keys = -np.log(np.arange(1, experts + 1)) + random.gumbel(size=(tokens, experts))
        places = np.argsort(-keys, axis=1)[:, :top_k]
    elif kind == "one-hot":
        places = np.broadcast_to(np.arange(top_k), (tokens, top_k))
    else:
        raise ValueError(f"routing {kind!r} cannot be forced")
    weights = np.full((tokens, top_k), 1.0 / top_k, np.float32)
    return names[places].astype(np.int32), weights


def force_all(kind: str, layers: Sequence[MoELayer], tokens: int, seed: int) -> list[Routing]:
    """:func:`forced_routing` for every layer, in order."""
    return [forced_routing(kind, layer, tokens, seed) for layer in layers]


def imbalance(expert_ids: Sequence[NDArray[np.int32]], num_experts: Sequence[int]) -> float | None:
    """Load of the busiest expert over the mean load (1 = balanced, E/K = one-hot), mean over layers.

    ``expert_ids``: per layer [T, K], −1 = dropped. None when no layer has an assignment.
    """
    import numpy as np

    found = []
    for ids, experts in zip(expert_ids, num_experts, strict=True):
        counts = np.bincount(ids[ids >= 0].astype(np.int64), minlength=experts)
        if counts.sum():
            found.append(float(counts.max() * experts / counts.sum()))
    return float(np.mean(found)) if found else None
