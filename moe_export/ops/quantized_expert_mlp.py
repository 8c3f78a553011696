"""QuantizedExpertMLP: ExpertMLP with weights of 8 or 4 bits in blocks, and float activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import expert_mlp
from .contract import FLOAT_TOLERANCE, FLOAT_TYPES, Attribute, OpContract, Param
from .expert_mlp import ACTIVATIONS, expert_chain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BITS = (8, 4)
BLOCKS = (16, 32, 64, 128)


def reference(
    hidden: NDArray[Any],
    expert_ids: NDArray[np.int32],
    weights: NDArray[Any],
    up_codes: NDArray[Any],
    up_scales: NDArray[np.float32],
    down_codes: NDArray[Any],
    down_scales: NDArray[np.float32],
    up_bias: NDArray[Any] | None = None,
    down_bias: NDArray[Any] | None = None,
    *,
    num_experts: int,
    activation: str = "silu",
    gated: int = 1,
    bits: int = 8,
    block: int = 32,
    alpha: float = 1.702,
    limit: float = 7.0,
    biased: int = 0,
    layer: str = "",
) -> NDArray[np.float64]:
    """ExpertMLP's reference on the weights that the codes stand for, in float64: [T, H]."""
    from .quantized_packing import unpack

    inner = down_scales.shape[2] * block
    return expert_mlp.reference(
        hidden,
        expert_ids,
        weights,
        unpack(up_codes, up_scales, inner * (2 if gated else 1), gated=bool(gated)),
        unpack(down_codes, down_scales, hidden.shape[1], gated=False),
        up_bias,
        down_bias,
        num_experts=num_experts,
        activation=activation,
        gated=gated,
        alpha=alpha,
        limit=limit,
        biased=biased,
    )


def _decoded(p: str, bits: int, block: int) -> str:
    """Body lines from one expert's codes ``{p}_expert_codes`` and scales to panels ``{p}_panels``
    [P, D, 64], float32."""
    if bits == 4:
        # Two's complement in four bits: (n xor 8) - 8.
        codes = f"""
            {p}_mask = Constant <value = uint8 {{15}}> ()
            {p}_four = Constant <value = uint8 {{4}}> ()
            {p}_eight = Constant <value = uint8 {{8}}> ()
            {p}_low = BitwiseAnd ({p}_expert_codes, {p}_mask)
            {p}_high = BitShift <direction = "RIGHT"> ({p}_expert_codes, {p}_four)
            {p}_nibble_axis = Constant <value_ints = [4]> ()
            {p}_low_5d = Unsqueeze ({p}_low, {p}_nibble_axis)
            {p}_high_5d = Unsqueeze ({p}_high, {p}_nibble_axis)
            {p}_nibbles = Concat <axis = 4> ({p}_low_5d, {p}_high_5d)
            {p}_binary = BitwiseXor ({p}_nibbles, {p}_eight)
            {p}_binary_f = Cast <to = 1> ({p}_binary)
            {p}_zero_point = Constant <value_float = 8.0> ()
            {p}_signed = Sub ({p}_binary_f, {p}_zero_point)
            {p}_steps_shape = Constant <value_ints = [0, 0, 64, 8]> ()
            {p}_by_column = Reshape ({p}_signed, {p}_steps_shape)
            {p}_plain = Transpose <perm = [0, 1, 3, 2]> ({p}_by_column)"""
    else:
        codes = f"{p}_plain = Cast <to = 1> ({p}_expert_codes)"
    return f"""
            {codes}
            {p}_scale_axis = Constant <value_ints = [2]> ()
            {p}_scale_4d = Unsqueeze ({p}_expert_scales, {p}_scale_axis)
            {p}_count = Shape <start = 0, end = 2> ({p}_expert_scales)
            {p}_block_shape = Constant <value_ints = [{block}, 64]> ()
            {p}_blocks_shape = Concat <axis = 0> ({p}_count, {p}_block_shape)
            {p}_blocks = Reshape ({p}_plain, {p}_blocks_shape)
            {p}_scaled = Mul ({p}_blocks, {p}_scale_4d)
            {p}_panels_shape = Constant <value_ints = [0, -1, 64]> ()
            {p}_panels = Reshape ({p}_scaled, {p}_panels_shape)"""


def _matrix(p: str, gated: bool, columns: str) -> str:
    """Body lines from ``{p}_panels`` to ``{p}_matrix`` [D, N]; ``columns`` names N, or I when gated."""
    if gated:
        return f"""
            {p}_pairs_shape = Constant <value_ints = [0, 0, 2, 32]> ()
            {p}_pairs = Reshape ({p}_panels, {p}_pairs_shape)
            {p}_halves = Transpose <perm = [1, 2, 0, 3]> ({p}_pairs)
            {p}_halves_shape = Constant <value_ints = [0, 0, -1]> ()
            {p}_wide = Reshape ({p}_halves, {p}_halves_shape)
            {p}_column_axis = Constant <value_ints = [2]> ()
            {p}_cut = Slice ({p}_wide, zero_1d, {columns}, {p}_column_axis)
            {p}_flat_shape = Constant <value_ints = [0, -1]> ()
            {p}_matrix = Reshape ({p}_cut, {p}_flat_shape)"""
    return f"""
            {p}_rows_first = Transpose <perm = [1, 0, 2]> ({p}_panels)
            {p}_flat_shape = Constant <value_ints = [0, -1]> ()
            {p}_wide = Reshape ({p}_rows_first, {p}_flat_shape)
            {p}_matrix = Slice ({p}_wide, zero_1d, {columns}, one_1d)"""


def _product(p: str, source: str, target: str, gated: bool, columns: str, bits: int, block: int) -> str:
    """Body lines for ``target`` = each expert's rows of ``source`` (float32) times its decoded matrix. One
    expert at a time, and only those that have rows: the decoded weights are never all in memory."""
    return f"""
    {p}_size = Identity ({columns})
    {p}_width = {f"Add ({columns}, {columns})" if gated else f"Identity ({columns})"}
    {p}_head_shape = Concat <axis = 0> (first, {p}_width)
    {p}_tail_shape = Concat <axis = 0> (rest, {p}_width)
    {p}_head = ConstantOfShape ({p}_head_shape)
    {p}_tail = ConstantOfShape ({p}_tail_shape)
    {p}_parts_0 = SequenceConstruct ({p}_head)
    {p}_parts_n = Loop (used_count, true, {p}_parts_0) <body = {p}_each_expert
        (int64 {p}_step, bool {p}_keep, seq(float[r, c]) {p}_parts)
        => (bool {p}_keep_out, seq(float[r, c]) {p}_parts_out)
        {{
            {p}_keep_out = Identity ({p}_keep)
            {p}_expert = Gather <axis = 0> (used, {p}_step)
            {p}_expert_1d = Unsqueeze ({p}_expert, zero_1d)
            {p}_begin = Gather <axis = 0> (starts, {p}_expert_1d)
            {p}_end = Gather <axis = 0> (ends, {p}_expert_1d)
            {p}_rows = Slice ({source}, {p}_begin, {p}_end, zero_1d)
            {p}_expert_codes = Gather <axis = 0> ({p}_codes, {p}_expert)
            {p}_expert_scales = Gather <axis = 0> ({p}_scales, {p}_expert)
            {_decoded(p, bits, block)}
            {_matrix(p, gated, f"{p}_size")}
            {p}_part = MatMul ({p}_rows, {p}_matrix)
            {p}_parts_out = SequenceInsert ({p}_parts, {p}_part)
        }}>
    {p}_parts_all = SequenceInsert ({p}_parts_n, {p}_tail)
    {target} = ConcatFromSequence <axis = 0> ({p}_parts_all)
    """


def body(attributes: Mapping[str, Any], _opset: int) -> str:
    form = attributes["bits"], attributes["block"]
    up = f"""
    zero_1d = Constant <value_ints = [0]> ()
    one_1d = Constant <value_ints = [1]> ()
    int_max_1d = Constant <value_ints = [9223372036854775807]> ()
    true = Constant <value = bool {{1}}> ()
    starts = Slice (offsets, zero_1d, last_1d, zero_1d)
    ends = Slice (offsets, one_1d, int_max_1d, zero_1d)
    counts = Sub (ends, starts)
    has_rows = Greater (counts, zero_0d)
    used_2d = NonZero (has_rows)
    used = Squeeze (used_2d, zero_1d)
    used_count_1d = Shape (used)
    used_count = Squeeze (used_count_1d)
    first = Slice (starts, zero_1d, one_1d, zero_1d)
    last = Slice (ends, last_1d, int_max_1d, zero_1d)
    all_rows = Shape <start = 0, end = 1> (rows)
    rest = Sub (all_rows, last)
    outer_size = Shape <start = 1, end = 2> (hidden)
    block_1d = Constant <value_ints = [{attributes["block"]}]> ()
    inner_blocks = Shape <start = 2, end = 3> (down_scales)
    inner_size = Mul (inner_blocks, block_1d)
    {_product("up", "rows", "inner_f32", bool(attributes["gated"]), "inner_size", *form)}"""
    down = _product("down", "activated", "outer_f32", False, "outer_size", *form)
    return expert_chain({**attributes, "layout": "concatenated"}, up, down)


def _conflict(attributes: Mapping[str, Any]) -> str:
    if attributes["activation"] == "clamped_swiglu" and not attributes["gated"]:
        return "activation clamped_swiglu needs gated 1"
    return ""


_CODES = "int8 with 8 bits, uint8 [E, {0}/8, 64, 4] with 4; zeros fill the last panel"

QUANTIZED_EXPERT_MLP = OpContract(
    name="QuantizedExpertMLP",
    summary="ExpertMLP with weights of 8 or 4 bits: a weight is a signed code times the scale of its block "
    "of inputs. Activations stay floats. Layout: moe_export/ops/quantized_packing.py.",
    inputs=(
        Param("hidden", ("T", "H"), FLOAT_TYPES, "tokens"),
        Param("expert_ids", ("T", "K"), ("int32",), "from Router; negative = dropped"),
        Param("weights", ("T", "K"), ("float32",), "from Router"),
        Param(
            "up_codes",
            ("E", "U", "H", "64"),
            ("int8", "uint8"),
            "panels of 32 gate columns and their 32 up columns (not gated: 64 columns); "
            + _CODES.format("U, H"),
        ),
        Param("up_scales", ("E", "U", "H/block", "64"), ("float32",), "one per column and block of inputs"),
        Param(
            "down_codes",
            ("E", "D", "I", "64"),
            ("int8", "uint8"),
            "panels of 64 columns; " + _CODES.format("D, I"),
        ),
        Param("down_scales", ("E", "D", "I/block", "64"), ("float32",), "one per column and block of inputs"),
        Param("up_bias", ("E", "2I or I"), FLOAT_TYPES, "bias of up: gates, then ups", optional=True),
        Param("down_bias", ("E", "H"), FLOAT_TYPES, "bias of down", optional=True),
    ),
    outputs=(Param("out", ("T", "H"), FLOAT_TYPES, "combined expert outputs"),),
    attributes=(
        Attribute("num_experts", int, "number of experts E", minimum=1),
        Attribute(
            "activation", str, "activation function", default="silu", choices=ACTIVATIONS, structural=True
        ),
        Attribute("gated", int, "1: f(gate) * up", default=1, choices=(0, 1), structural=True),
        Attribute("bits", int, "bits of a code", default=8, choices=BITS, structural=True),
        Attribute(
            "block",
            int,
            "inputs that share a scale; divides H and I",
            default=32,
            choices=BLOCKS,
            structural=True,
        ),
        Attribute("alpha", float, "clamped_swiglu: factor in the sigmoid", default=1.702),
        Attribute("limit", float, "clamped_swiglu: clamp", default=7.0),
        Attribute("biased", int, "1: both biases are given", default=0, choices=(0, 1), structural=True),
        Attribute("layer", str, "name of the MoE layer in the source model", default=""),
    ),
    reference=reference,
    body=body,
    tolerance=FLOAT_TOLERANCE,
    conflict=_conflict,
)
