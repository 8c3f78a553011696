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
    # The last Reshape is for T = 0: ONNX Runtime's ReduceSum then returns its input's shape.
    return """
    count = Shape (order)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    total = Squeeze (count)
    positions = Range (zero, total, one)
    inverse = ScatterElements <axis = 0> (positions, order, positions)
    unsorted = Gather <axis = 0> (rows, inverse)
    unsorted_f32 = Cast <to = 1> (unsorted)
    weights_shape = Shape (weights)
    width = Shape <start = 1, end = 2> (rows)
    shape = Concat <axis = 0> (weights_shape, width)
    grouped = Reshape <allowzero = 1> (unsorted_f32, shape)
    weights_f32 = Cast <to = 1> (weights)
    last_axis = Constant <value_ints = [-1]> ()
    weights_column = Unsqueeze (weights_f32, last_axis)
    weighted = Mul (grouped, weights_column)
    axis = Constant <value_ints = [1]> ()
    summed = ReduceSum <keepdims = 0> (weighted, axis)
    tokens = Shape <start = 0, end = 1> (weights)
    out_shape = Concat <axis = 0> (tokens, width)
    out_f32 = Reshape <allowzero = 1> (summed, out_shape)
    out = CastLike (out_f32, rows)
    """


COMBINE = OpContract(
    name="Combine",
    summary="Brings expert outputs back to token order and sums each token's K rows with its routing weights, in order.",
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
