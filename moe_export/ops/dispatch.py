"""Dispatch: sort the M = T*K assignments by expert, stably by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .contract import Attribute, OpContract, Param

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def reference(
    expert_ids: NDArray[np.int32], num_experts: int, drops: int = 1, layer: str = ""
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Stable counting sort of ``expert_ids`` [T, K] read row by row.

    Returns ``order`` int64 [M] (positions in the flattened ids, sorted by expert, then by token), ``offsets``
    int64 [E+1]: expert *e* owns ``order[offsets[e]:offsets[e+1]]``, and ``tokens`` int64 [M], the token of
    each assignment (``order // K``). Negative ids (dropped) come before ``offsets[0]``, ids of E and more
    (experts of another rank) after ``offsets[E]``.
    """
    import numpy as np

    flat = np.asarray(expert_ids).reshape(-1).astype(np.int64)
    order = np.argsort(flat, kind="stable").astype(np.int64)
    offsets = np.searchsorted(flat[order], np.arange(num_experts + 1), side="left").astype(np.int64)
    return order, offsets, order // max(np.asarray(expert_ids).shape[1], 1)


def body(_attributes: Mapping[str, Any], _opset: int) -> str:
    # TopK takes the lower index first among equals (ONNX), so it sorts stably.
    return """
    minus_one_1d = Constant <value_ints = [-1]> ()
    one_1d = Constant <value_ints = [1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    num_experts_value = Constant <value_int : int = @num_experts> ()
    bound = Add (num_experts_value, one)
    experts_64 = Range (zero, bound, one)
    experts = Cast <to = 6> (experts_64)
    expert_column = Unsqueeze (experts, minus_one_1d)
    ids = Reshape (expert_ids, minus_one_1d)
    count_1d = Shape (ids)
    sorted_ids, order = TopK <axis = 0, largest = 0, sorted = 1> (ids, count_1d)
    before = Less (sorted_ids, expert_column)
    before_64 = Cast <to = 7> (before)
    offsets = ReduceSum <keepdims = 0> (before_64, one_1d)
    top_k = Shape <start = 1, end = 2> (expert_ids)
    tokens = Div (order, top_k)
    """


DISPATCH = OpContract(
    name="Dispatch",
    summary="Sorts the assignments of tokens to experts by expert, then by token, and says where each "
    "expert's begin.",
    inputs=(
        Param("expert_ids", ("T", "K"), ("int32",), "chosen experts; negative = dropped, >= E = not ours"),
    ),
    outputs=(
        Param(
            "order",
            ("M",),
            ("int64",),
            "positions in the flattened expert_ids, sorted by expert, then by token",
        ),
        Param("offsets", ("E+1",), ("int64",), "expert e owns order[offsets[e]:offsets[e+1]]"),
        Param("tokens", ("M",), ("int64",), "token of each sorted assignment: order // K"),
    ),
    attributes=(
        Attribute("num_experts", int, "number of experts E", minimum=1),
        Attribute("drops", int, "0: promises that every id is in [0, E)", default=1, choices=(0, 1)),
        Attribute("layer", str, "name of the MoE layer in the source model", default=""),
    ),
    reference=reference,
    body=body,
)
