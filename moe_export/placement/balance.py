"""Expert-parallel load balancing after DeepSeek's published EPLB, written from its description.

DeepSeek-V3 technical report, section 3.4 (https://arxiv.org/abs/2412.19437), and
https://github.com/deepseek-ai/EPLB: experts with most load get replicas until all slots are used; slots are
packed on ranks, heaviest first. *Hierarchical*, where the machines divide the router's groups of experts:
groups are packed on machines, replicas are made inside each machine, and then packed on its ranks. *Global*
otherwise.

Beyond what was published: any number of experts and slots (ranks then differ by one slot), no rank holds an
expert twice, packed slots change places while the busiest rank gets lighter by it, and of the slots for
replicas as many are used as make the busiest rank lightest (more are not always better).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_export.errors import UsageError
from moe_export.placement.measure import rank_loads
from moe_export.placement.packing import pack, replicate
from moe_export.schema import LayerPlacement

Ranks = tuple[tuple[int, ...], ...]
_TRIED = 16
"""So many numbers of replicas are tried besides none."""
_EQUAL = 1e-9
"""Loads that differ by so little, relatively, are equal: the placement with fewer slots is taken."""


def contiguous(num_experts: Sequence[int], ranks: int) -> tuple[LayerPlacement, ...]:
    """Per MoE layer with E experts: rank r holds those from r E // R to (r + 1) E // R.

    Raises:
        UsageError: more ranks than experts of a layer.
    """
    return tuple(
        LayerPlacement(index, _in_order(index, experts, ranks)) for index, experts in enumerate(num_experts)
    )


def place(
    loads: Sequence[ArrayLike],
    ranks: int,
    *,
    nodes: int = 1,
    groups: int | Sequence[int | None] | None = None,
    redundant: int = 0,
) -> tuple[LayerPlacement, ...]:
    """Experts on ``ranks`` so that the busiest rank of each layer has little load.

    ``loads``: per MoE layer [E], how often each expert is chosen. ``nodes``: machines, each with the same
    number of neighbouring ranks. ``groups``: groups of experts that the router chooses between (of all
    layers, or of each), each of neighbouring experts; a group's experts stay on one machine where the
    machines divide the groups.
    ``redundant``: slots for replicas per layer, at most; fewer are used where that makes the busiest rank
    lighter. Never worse, on these loads, than :func:`contiguous`.

    Raises:
        UsageError: numbers that do not go together, or loads that are not finite and 0 or more.
    """
    if ranks < 1 or nodes < 1 or ranks % nodes:
        raise UsageError(f"{ranks} ranks do not lie evenly on {nodes} machines")
    if redundant < 0:
        raise UsageError(f"redundant experts: {redundant}; expected 0 or more")
    each_groups = [groups] * len(loads) if groups is None or isinstance(groups, int) else list(groups)
    return tuple(
        LayerPlacement(index, _layer(index, np.asarray(load, np.float64), ranks, nodes, own, redundant))
        for index, (load, own) in enumerate(zip(loads, each_groups, strict=True))
    )


def _in_order(index: int, experts: int, ranks: int) -> Ranks:
    if not 1 <= ranks <= experts:
        raise UsageError(
            f"MoE layer {index}: {ranks} ranks for {experts} experts, so that a rank would have none; use 1 "
            f"to {experts} ranks, or placement balanced with redundant experts"
        )
    starts = [rank * experts // ranks for rank in range(ranks + 1)]
    return tuple(tuple(range(*starts[rank : rank + 2])) for rank in range(ranks))


def _layer(
    index: int, loads: NDArray[np.float64], ranks: int, nodes: int, groups: int | None, redundant: int
) -> Ranks:
    where = f"MoE layer {index}"
    if loads.ndim != 1 or not len(loads) or not np.isfinite(loads).all() or loads.min() < 0:
        raise UsageError(f"{where}: loads: expected one finite number of 0 or more for each expert")
    experts = len(loads)
    if groups is not None and (groups < 1 or experts % groups):
        raise UsageError(f"{where}: {experts} experts do not divide into {groups} groups")
    if groups is None or groups % nodes:
        nodes, groups = 1, None  # the global policy
    if ranks > experts + redundant:
        raise UsageError(
            f"{where}: {ranks} ranks for {experts + redundant} slots ({experts} experts, {redundant} "
            f"redundant), so that a rank would have none; use fewer ranks or {ranks - experts} redundant "
            "experts"
        )
    most = experts * (ranks // nodes - 1)
    if redundant > most:
        inside = "" if nodes == 1 else " of its machine"
        raise UsageError(
            f"{where}: {redundant} redundant experts; with {most} every rank{inside} has every expert"
        )

    def busiest(found: Ranks) -> float:
        return float(rank_loads(LayerPlacement(index, found), loads).max())

    numbers = {redundant * step // _TRIED for step in range(_TRIED + 1)} | {max(ranks - experts, 0)}
    found = [
        _divide(loads, ranks, nodes, groups, number)
        for number in sorted(numbers)
        if number >= ranks - experts
    ]
    if ranks <= experts:
        found.insert(0, _in_order(index, experts, ranks))
    best = found[0]
    for other in found[1:]:
        if busiest(other) < busiest(best) * (1 - _EQUAL):
            best = other
    return best


def _divide(
    loads: NDArray[np.float64], ranks: int, nodes: int, groups: int | None, redundant: int
) -> Ranks:
    """The published policies, with exactly ``redundant`` replicas."""
    slots = len(loads) + redundant
    sizes = [(rank + 1) * slots // ranks - rank * slots // ranks for rank in range(ranks)]
    members = [np.arange(len(loads))]
    if nodes > 1 and groups is not None:
        each = np.arange(len(loads)).reshape(groups, -1)
        ones = np.ones(groups, np.int64)
        packed = pack(loads[each].sum(axis=1), ones, [groups // nodes] * nodes)
        members = [each[chosen].reshape(-1) for chosen in packed]
    found: list[tuple[int, ...]] = []
    for node, own in enumerate(members):
        here = sizes[node * ranks // nodes : (node + 1) * ranks // nodes]
        counts = replicate(loads[own], sum(here), len(here))
        found += [tuple(int(own[e]) for e in row) for row in pack(loads[own], counts, here)]
    return tuple(found)
