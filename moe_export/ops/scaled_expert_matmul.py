"""ScaledExpertMatMul: ExpertMatMul of float8 matrices with a scale per block, as DeepSeek-V3 has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .contract import FLOAT_TOLERANCE, FLOAT_TYPES, Attribute, OpContract, Param
from .expert_matmul import expert_branch, joined_branches, unfolded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def reference(
    rows: NDArray[Any],
    offsets: NDArray[np.int64],
    scale: NDArray[Any],
    *weight: NDArray[Any],
    num_experts: int,
    block_rows: int,
    block_columns: int,
) -> NDArray[np.float64]:
    """:func:`~moe_export.ops.expert_matmul.reference` with each matrix times its scales.

    ``scale`` [E, ceil(B / block_rows), ceil(A / block_columns)]: element [e, i, j] is that of block [i, j] of
    matrix e; E times ``weight``, float8 [B, A]. Returns float64 [M, B].
    """
    import numpy as np

    from .expert_matmul import reference as plain

    if not len(weight) == len(scale) == num_experts:
        raise UsageError(
            f"ScaledExpertMatMul: {len(weight)} matrices and scales of {len(scale)} for {num_experts} experts"
        )
    matrices = []
    for matrix, factors in zip(weight, scale, strict=True):
        size_b, size_a = matrix.shape
        wide = np.asarray(factors, np.float64).repeat(block_rows, 0).repeat(block_columns, 1)
        matrices.append(np.asarray(matrix, np.float64) * wide[:size_b, :size_a])
    return plain(rows, offsets, *matrices, num_experts=num_experts)


def body(attributes: Mapping[str, Any], opset: int) -> str:
    def branch(e: int) -> str:
        own = f"own_{e} = Squeeze (at_{e})\nfactors_{e} = Gather <axis = 0> (scale, own_{e})\n"
        held = f"matrix_{e} = Identity (weight_{e})\n" if opset < 21 else f"{unfolded(e)}\n"
        made = scaled(f"matrix_{e}", f"factors_{e}", f"matrix_f32_{e}", attributes, opset)
        return expert_branch(e, own + held + made)

    return joined_branches(attributes["num_experts"], branch)


def scaled(weight: str, scale: str, out: str, attributes: Mapping[str, Any], opset: int) -> str:
    """Nodes that make the float32 value ``out`` of float8 ``weight`` and ``scale``. Opset 20 has neither
    scales of blocks nor, in ONNX Runtime, a Reshape of float8."""
    rows, columns = attributes["block_rows"], attributes["block_columns"]
    text = f"""
        {out}_size = Shape <start = 0, end = 1> ({weight})
        {out}_count = Squeeze ({out}_size)
        {out}_zero = Constant <value_int = 0> ()
        {out}_one = Constant <value_int = 1> ()
        {out}_block = Constant <value_int = {rows}> ()
        {out}_each = Range ({out}_zero, {out}_count, {out}_one)
        {out}_row = Div ({out}_each, {out}_block)
        {out}_scales = Gather <axis = 0> ({scale}, {out}_row)
    """
    if opset >= 21:
        return text + f"{out} = DequantizeLinear <axis = 1, block_size = {columns}> ({weight}, {out}_scales)"
    return (
        text
        + f"""
        {out}_width = Shape <start = 1, end = 2> ({weight})
        {out}_columns = Squeeze ({out}_width)
        {out}_span = Constant <value_int = {columns}> ()
        {out}_every = Range ({out}_zero, {out}_columns, {out}_one)
        {out}_column = Div ({out}_every, {out}_span)
        {out}_factors = Gather <axis = 1> ({out}_scales, {out}_column)
        {out}_codes = Cast <to = 1> ({weight})
        {out} = Mul ({out}_codes, {out}_factors)
    """
    )


SCALED_EXPERT_MATMUL = OpContract(
    name="ScaledExpertMatMul",
    summary="Multiplies the rows of each expert, sorted by expert, with that expert's float8 matrix times "
    "the scales of its blocks.",
    inputs=(
        Param("rows", ("M", "A"), FLOAT_TYPES, "activations sorted by expert"),
        Param("offsets", ("E+1",), ("int64",), "where each expert's rows begin (Dispatch)"),
        Param(
            "scale",
            ("E", "ceil(B/block_rows)", "ceil(A/block_columns)"),
            ("float32",),
            "what each block of each expert's matrix is multiplied by",
        ),
        Param("weight", ("B", "A"), ("float8e4m3fn",), "the matrix of one expert", count="num_experts"),
    ),
    outputs=(
        Param(
            "out", ("M", "B"), FLOAT_TYPES, "products, dtype of rows; rows that belong to no expert are zero"
        ),
    ),
    attributes=(
        Attribute("num_experts", int, "E", structural=True, minimum=1),
        Attribute("block_rows", int, "rows of a matrix that share scales", structural=True, minimum=1),
        Attribute("block_columns", int, "columns that do", structural=True, minimum=1),
    ),
    reference=reference,
    body=body,
    tolerance=FLOAT_TOLERANCE,
    source="DeepSeek-V3: weights in float8e4m3fn with a float32 scale per block of 128 x 128",
)
