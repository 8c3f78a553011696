"""Which rank computes which expert of which token, in expert-parallel models: ExpertSlots, RankLoad,
RankDispatch and RankCombine.

R ranks of S slots each; a slot holds one expert. An expert may lie in several slots (replicas).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .contract import FLOAT_TOLERANCE, FLOAT_TYPES, Attribute, OpContract, Param
from .rank_routing_bodies import combine_body, dispatch_body, load_body, slots_body

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RANKS = Attribute("ranks", int, "number of ranks R", minimum=1)
SLOTS_PER_RANK = Attribute(
    "slots_per_rank", int, "slots S of a rank; slot s lies on rank s // S, as its slot s % S", minimum=1
)
_SLOTS = Param("slots", ("T", "K"), ("int32",), "from ExpertSlots: -1 (none) or in [0, R*S)")


def slots_reference(expert_ids: NDArray[np.int32], table: NDArray[np.int32]) -> NDArray[np.int32]:
    """``slots[t, k] = table[expert_ids[t, k], t mod L]``, and -1 for a negative id.

    ``expert_ids`` [T, K], ``table`` [E, L]. Returns int32 [T, K].

    Raises:
        UsageError: an id of E or more.
    """
    import numpy as np

    ids, places = np.asarray(expert_ids), np.asarray(table, np.int32)
    if ids.size and ids.max() >= len(places):
        raise UsageError(f"ExpertSlots: expert id {ids.max()}; the table has {len(places)} experts")
    slots = np.full(ids.shape, -1, np.int32)
    for t, k in np.argwhere(ids >= 0):
        slots[t, k] = places[ids[t, k], t % places.shape[1]]
    return slots


def load_reference(
    slots: NDArray[np.int32], ranks: int, slots_per_rank: int, layer: str = ""
) -> NDArray[np.int64]:
    """The largest number of distinct tokens with a slot on one rank, at least 1. ``slots`` [T, K]. Returns
    int64 [1].

    Raises:
        UsageError: a slot outside [-1, R*S).
    """
    import numpy as np

    touched = _touched(slots, ranks, slots_per_rank)
    return np.asarray([max(1, *(len(tokens) for tokens in touched))], np.int64)


def dispatch_reference(
    hidden: NDArray[Any],
    slots: NDArray[np.int32],
    weights: NDArray[np.float32],
    capacity: NDArray[np.int64],
    ranks: int,
    slots_per_rank: int,
    layer: str = "",
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """One block of ``C = capacity[0]`` rows per rank: the tokens with a slot there, once each, in order.

    ``hidden`` [T, H], ``slots`` and ``weights`` [T, K]. Returns ``rows`` [R*C, H] (zero where unused),
    ``route`` [R*C, 2K]: each row's K slots on its rank (-1: that choice lies elsewhere), then their K weights
    (0 there), and ``places`` int64 [T, min(R, K)]: the token's rows, ascending, then -1. A block that would
    need more rows keeps the first C tokens.

    Raises:
        UsageError: a slot outside [-1, R*S), or no room at all.
    """
    import numpy as np

    x, chosen = np.asarray(hidden, np.float64), np.asarray(slots, np.int64)
    room, top_k = int(np.asarray(capacity).reshape(-1)[0]), chosen.shape[1]
    if room < 1:
        raise UsageError(f"RankDispatch: capacity {room}; expected at least 1")
    rows = np.zeros((ranks * room, x.shape[1]))
    route = np.zeros((ranks * room, 2 * top_k))
    route[:, :top_k] = -1
    found: list[list[int]] = [[] for _ in chosen]
    for rank, tokens in enumerate(_touched(slots, ranks, slots_per_rank)):
        for row, token in enumerate(tokens[:room], start=rank * room):
            mine = chosen[token] // slots_per_rank == rank
            rows[row] = x[token]
            route[row, :top_k] = np.where(mine, chosen[token] - rank * slots_per_rank, -1)
            route[row, top_k:] = np.where(mine, np.asarray(weights, np.float64)[token], 0.0)
            found[token].append(row)
    places = np.full((len(chosen), min(ranks, top_k)), -1, np.int64)
    for token, at in enumerate(found):
        places[token, : len(at)] = at
    return rows, route, places


def combine_reference(rows: NDArray[Any], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """``out[t]`` = sum over w of ``rows[places[t, w]]``; -1 adds nothing. ``rows`` [R*C, H], ``places``
    [T, W]. Returns float64 [T, H]."""
    import numpy as np

    x = np.asarray(rows, np.float64)
    out = np.zeros((len(places), x.shape[1]))
    for token, at in enumerate(np.asarray(places)):
        for row in at[at >= 0]:
            out[token] += x[row]
    return out


def _touched(slots: NDArray[np.int32], ranks: int, slots_per_rank: int) -> list[list[int]]:
    """For each rank the tokens that have a slot on it, in order."""
    import numpy as np

    chosen = np.asarray(slots, np.int64)
    if chosen.size and (chosen.min() < -1 or chosen.max() >= ranks * slots_per_rank):
        wrong = chosen.min() if chosen.min() < -1 else chosen.max()
        raise UsageError(f"slot {wrong}; expected -1 to {ranks * slots_per_rank - 1}")
    on = np.where(chosen < 0, -1, chosen // slots_per_rank)
    return [np.flatnonzero((on == rank).any(axis=1)).tolist() for rank in range(ranks)]


_LAYER = Attribute("layer", str, "name of the MoE layer in the source model", default="")

EXPERT_SLOTS = OpContract(
    name="ExpertSlots",
    summary="Where each chosen expert lies: its slot, by a table. Of several replicas the token's index "
    "chooses one.",
    inputs=(
        Param("expert_ids", ("T", "K"), ("int32",), "chosen experts, each less than E; negative = dropped"),
        Param(
            "table",
            ("E", "L"),
            ("int32",),
            "slot of each expert for tokens t with t mod L = column; -1 = on no slot of ours",
        ),
    ),
    outputs=(Param("slots", ("T", "K"), ("int32",), "table[expert_ids[t, k], t mod L]; -1 = none"),),
    attributes=(),
    reference=slots_reference,
    body=slots_body,
)

RANK_LOAD = OpContract(
    name="RankLoad",
    summary="How many rows the fullest block of RankDispatch needs: the most distinct tokens with a slot on "
    "one rank.",
    inputs=(_SLOTS,),
    outputs=(Param("load", ("1",), ("int64",), "at least 1"),),
    attributes=(RANKS, SLOTS_PER_RANK, _LAYER),
    reference=load_reference,
    body=load_body,
)

RANK_DISPATCH = OpContract(
    name="RankDispatch",
    summary="Copies each token into the block of every rank that has one of its experts, in blocks of equal "
    "size for AllToAll; a block with too little room keeps the first tokens.",
    inputs=(
        Param("hidden", ("T", "H"), FLOAT_TYPES, "tokens"),
        _SLOTS,
        Param("weights", ("T", "K"), ("float32",), "routing weights"),
        Param("capacity", ("1",), ("int64",), "rows C of a block, at least 1; RankLoad says what is needed"),
    ),
    outputs=(
        Param("rows", ("R*C", "H"), FLOAT_TYPES, "block r: tokens for rank r in order; unused rows are 0"),
        Param(
            "route",
            ("R*C", "2K"),
            ("float32",),
            "of each row K slots s % S of its rank (-1 = the choice lies elsewhere), then their weights",
        ),
        Param("places", ("T", "min(R,K)"), ("int64",), "rows of each token, ascending, then -1"),
    ),
    attributes=(RANKS, SLOTS_PER_RANK, _LAYER),
    reference=dispatch_reference,
    body=dispatch_body,
)

RANK_COMBINE = OpContract(
    name="RankCombine",
    summary="Sums each token's rows that came back from the ranks, in float32 and in the order of the ranks.",
    inputs=(
        Param("rows", ("R*C", "H"), FLOAT_TYPES, "weighted expert outputs, in RankDispatch's blocks"),
        Param("places", ("T", "W"), ("int64",), "from RankDispatch"),
    ),
    outputs=(Param("out", ("T", "H"), FLOAT_TYPES, "sums, dtype of rows"),),
    attributes=(),
    reference=combine_reference,
    body=combine_body,
    tolerance=FLOAT_TOLERANCE,
)
