"""GroupedMatMul: each expert's rows times that expert's matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .contract import FLOAT_TOLERANCE, FLOAT_TYPES, Attribute, OpContract, Param

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def reference(
    rows: NDArray[Any], weight: NDArray[Any], offsets: NDArray[np.int64], transposed: int = 0
) -> NDArray[np.float64]:
    """``out[m] = rows[m] @ W_e`` for ``offsets[e] <= m < offsets[e+1]``; zero elsewhere.

    ``rows`` [M, A]; ``weight`` [E, B, A] (``transposed=0``, the layout of ``torch.nn.Linear``) or [E, A, B]
    (``transposed=1``); ``offsets`` [E+1]. Returns float64 [M, B].
    """
    import numpy as np

    x = np.asarray(rows, np.float64)
    w = np.asarray(weight, np.float64)
    if not transposed:
        w = np.swapaxes(w, 1, 2)
    out = np.zeros((x.shape[0], w.shape[2]))
    for e in range(w.shape[0]):
        begin, end = int(offsets[e]), int(offsets[e + 1])
        out[begin:end] = x[begin:end] @ w[e]
    return out


def body(attributes: Mapping[str, Any], _opset: int) -> str:
    # Loop over the experts that have rows. Inside float32, so that one body serves every weight dtype.
    transpose = (
        "matrix = Identity (matrix_f32)" if attributes["transposed"] else "matrix = Transpose (matrix_f32)"
    )
    columns_axis = 2 if attributes["transposed"] else 1
    return f"""
    zero_1d = Constant <value_ints = [0]> ()
    one_1d = Constant <value_ints = [1]> ()
    minus_one_1d = Constant <value_ints = [-1]> ()
    int_max_1d = Constant <value_ints = [9223372036854775807]> ()
    starts = Slice (offsets, zero_1d, minus_one_1d, zero_1d)
    ends = Slice (offsets, one_1d, int_max_1d, zero_1d)
    counts = Sub (ends, starts)
    zero = Constant <value_int = 0> ()
    has_rows = Greater (counts, zero)
    used_2d = NonZero (has_rows)
    used = Squeeze (used_2d, zero_1d)
    used_count_1d = Shape (used)
    used_count = Squeeze (used_count_1d)
    columns = Shape <start = {columns_axis}, end = {columns_axis + 1}> (weight)
    first = Slice (starts, zero_1d, one_1d, zero_1d)
    last = Slice (ends, minus_one_1d, int_max_1d, zero_1d)
    all_rows = Shape <start = 0, end = 1> (rows)
    rest = Sub (all_rows, last)
    head_shape = Concat <axis = 0> (first, columns)
    tail_shape = Concat <axis = 0> (rest, columns)
    head = ConstantOfShape (head_shape)
    tail = ConstantOfShape (tail_shape)
    parts_0 = SequenceConstruct (head)
    true = Constant <value = bool {{1}}> ()
    parts_n = Loop (used_count, true, parts_0) <body = each_expert
        (int64 step, bool keep, seq(float[r, c]) parts) => (bool keep_out, seq(float[r, c]) parts_out)
        {{
            keep_out = Identity (keep)
            expert = Gather <axis = 0> (used, step)
            expert_1d = Unsqueeze (expert, zero_1d)
            begin = Gather <axis = 0> (starts, expert_1d)
            end = Gather <axis = 0> (ends, expert_1d)
            rows_e = Slice (rows, begin, end, zero_1d)
            rows_f32 = Cast <to = 1> (rows_e)
            matrix_raw = Gather <axis = 0> (weight, expert)
            matrix_f32 = Cast <to = 1> (matrix_raw)
            {transpose}
            part = MatMul (rows_f32, matrix)
            parts_out = SequenceInsert (parts, part)
        }}>
    parts_all = SequenceInsert (parts_n, tail)
    joined = ConcatFromSequence <axis = 0> (parts_all)
    out = CastLike (joined, rows)
    """


GROUPED_MATMUL = OpContract(
    name="GroupedMatMul",
    summary="Multiplies the rows of each expert, sorted by expert, with that expert's weight matrix.",
    inputs=(
        Param("rows", ("M", "A"), FLOAT_TYPES, "activations sorted by expert"),
        Param("weight", ("E", "B", "A"), FLOAT_TYPES, "one matrix per expert; [E, A, B] when transposed"),
        Param("offsets", ("E+1",), ("int64",), "where each expert's rows begin (Dispatch)"),
    ),
    outputs=(
        Param(
            "out", ("M", "B"), FLOAT_TYPES, "products, dtype of rows; rows that belong to no expert are zero"
        ),
    ),
    attributes=(
        Attribute("transposed", int, "1: weight is [E, A, B]", default=0, choices=(0, 1), structural=True),
    ),
    reference=reference,
    body=body,
    tolerance=FLOAT_TOLERANCE,
)
