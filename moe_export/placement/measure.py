"""How a placement spreads the load, and whether it is one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_export.errors import UsageError
from moe_export.schema import LayerPlacement


def rank_shares(placement: LayerPlacement, experts: int) -> NDArray[np.float64]:
    """What share of each expert's tokens each rank computes, float64 [E, R]: replicas share evenly."""
    slots = np.zeros((experts, len(placement.experts)))
    for rank, held in enumerate(placement.experts):
        np.add.at(slots[:, rank], np.asarray(held, np.int64), 1.0)
    return slots / np.maximum(slots.sum(axis=1, keepdims=True), 1.0)


def rank_loads(placement: LayerPlacement, loads: ArrayLike) -> NDArray[np.float64]:
    """Load of each rank, [..., R], from that of each expert, [..., E]."""
    loads = np.asarray(loads, np.float64)
    total: NDArray[np.float64] = loads @ rank_shares(placement, loads.shape[-1])
    return total


def imbalance(placement: LayerPlacement, loads: ArrayLike) -> float:
    """Load of the busiest rank over the mean of the ranks: 1 = balanced, also where there is no load."""
    found = rank_loads(placement, loads)
    mean = float(found.mean())
    return float(found.max()) / mean if mean > 0 else 1.0


def check_placement(layers: Sequence[LayerPlacement], num_experts: Sequence[int], ranks: int) -> None:
    """Every layer's experts lie on ``ranks`` ranks: each at least once, none twice on one rank, no rank
    without any, and ranks differ by one slot at most.

    Raises:
        UsageError: they do not; the message names layer, rank and expert.
    """
    if len(layers) != len(num_experts):
        raise UsageError(
            f"the placement has {len(layers)} MoE layers, the model {len(num_experts)}: it is for another "
            "model"
        )
    for layer, experts in zip(layers, num_experts, strict=True):
        where = f"placement of MoE layer {layer.index}"
        if len(layer.experts) != ranks:
            raise UsageError(f"{where}: it is for {len(layer.experts)} ranks, expected {ranks}")
        for rank, held in enumerate(layer.experts):
            if not held:
                raise UsageError(f"{where}: rank {rank} has no expert; use fewer ranks")
            for expert in held:
                if not 0 <= expert < experts:
                    raise UsageError(
                        f"{where}: rank {rank} has expert {expert}, and the layer's are 0 to {experts - 1}"
                    )
            if len(set(held)) != len(held):
                twice = next(e for e in held if held.count(e) > 1)
                raise UsageError(f"{where}: rank {rank} has expert {twice} twice, which helps nobody")
        if missing := set(range(experts)) - {e for held in layer.experts for e in held}:
            raise UsageError(f"{where}: expert {min(missing)} is on no rank")
        sizes = [len(held) for held in layer.experts]
        if max(sizes) - min(sizes) > 1:
            raise UsageError(
                f"{where}: ranks have {min(sizes)} to {max(sizes)} experts; expected one more at most"
            )
