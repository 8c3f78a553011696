"""Combine: weighted sum of each token's expert outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .contract import FLOAT_TOLERANCE, FLOAT_TYPES, OpContract, Param

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def reference(rows: NDArray[Any], order: NDArray[np.int64], weights: NDArray[Any]) -> NDArray[np.float64]:
    """``out[t] = sum_k weights[t, k] * rows[inverse(order)[t*K + k]]``.

    ``rows`` [M, H] sorted by expert, ``order`` [M] from Dispatch, ``weights`` [T, K]. Returns float64 [T, H].
    """
    import numpy as np

    x = np.asarray(rows, np.float64)
    w = np.asarray(weights, np.float64)
    unsorted = np.zeros_like(x)
    unsorted[np.asarray(order)] = x
    return np.asarray((unsorted.reshape(*w.shape, x.shape[1]) * w[:, :, None]).sum(axis=1))


def body(_attributes: Mapping[str, Any], _opset: int) -> str:
    # Sorting a permutation gives its inverse; the weighted sum over K is one small matrix product per token.
    return """
    count = Shape (order)
    sorted_order, inverse = TopK <axis = 0, largest = 0, sorted = 1> (order, count)
    weights_shape = Shape (weights)
    inverse_by_token = Reshape <allowzero = 1> (inverse, weights_shape)
    grouped = Gather <axis = 0> (rows, inverse_by_token)
    grouped_f32 = Cast <to = 1> (grouped)
    axis = Constant <value_ints = [1]> ()
    weights_row = Unsqueeze (weights, axis)
    summed = MatMul (weights_row, grouped_f32)
    out_f32 = Squeeze (summed, axis)
    out = CastLike (out_f32, rows)
    """


COMBINE = OpContract(
    name="Combine",
    summary="Brings expert outputs back to token order and sums each token's K rows, weighted, in order.",
    inputs=(
        Param("rows", ("M", "H"), FLOAT_TYPES, "expert outputs sorted by expert"),
        Param("order", ("M",), ("int64",), "from Dispatch"),
        Param("weights", ("T", "K"), ("float32",), "routing weights; accumulation is in float32"),
    ),
    outputs=(Param("out", ("T", "H"), FLOAT_TYPES, "weighted sums, dtype of rows"),),
    attributes=(),
    reference=reference,
    body=body,
    tolerance=FLOAT_TOLERANCE,
)
