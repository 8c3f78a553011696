"""Ops of ours that no pattern took, one by one as plain ONNX nodes that TensorRT's parser takes.

Their function bodies need TopK over all assignments (TensorRT: 3840 at most), NonZero, Loop and sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ops import DOMAIN
from .base import PassContext
from .native_text import ONNX_CODE, ONNX_TYPE, parse_function

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def dispatch_text(experts: int) -> str:
    """``expert_ids`` → ``order``, ``offsets``, ``tokens``, as :mod:`moe_export.ops.dispatch`, by counting.

    Dropped assignments keep the order they come in; the op's reference sorts them by their id, which nothing
    reads.
    """
    classes = experts + 2
    return f"""
    last = Constant <value_ints = [-1]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    most_1d = Constant <value_ints = [{classes}]> ()
    axis_0 = Constant <value_int = 0> ()
    axis_1 = Constant <value_int = 1> ()
    low = Constant <value = int32 {{-1}}> ()
    high = Constant <value = int32 {{{experts}}}> ()
    unit = Constant <value = int32 {{1}}> ()
    classes = Constant <value = int32[{classes}] {{{", ".join(str(c) for c in range(classes))}}}> ()
    flat = Reshape (expert_ids, last)
    raised = Max (flat, low)
    cut = Min (raised, high)
    shifted = Add (cut, unit)
    column = Unsqueeze (shifted, last)
    hit_bool = Equal (column, classes)
    hit = Cast <to = 6> (hit_bool)
    counts = ReduceSum <keepdims = 0> (hit, first)
    starts = CumSum <exclusive = 1> (counts, axis_0)
    earlier = CumSum <exclusive = 1> (hit, axis_0)
    places = Add (earlier, starts)
    own = Mul (places, hit)
    place = ReduceSum <keepdims = 0> (own, second)
    count_1d = Shape (flat)
    count = Squeeze (count_1d)
    numbers = Range (axis_0, count, axis_1)
    nothing = ConstantOfShape <value = int64[1] {{0}}> (count_1d)
    order = ScatterElements <axis = 0> (nothing, place, numbers)
    begins = Slice (starts, second, most_1d, first)
    offsets = Cast <to = 7> (begins)
    top_k = Shape <start = 1, end = 2> (expert_ids)
    tokens = Div (order, top_k)
    """


def combine_text(hidden: int, dtype: str) -> str:
    """``rows``, ``order``, ``weights`` → ``out``, as :mod:`moe_export.ops.combine`."""
    return f"""
    last = Constant <value_ints = [-1]> ()
    second = Constant <value_ints = [1]> ()
    axis_0 = Constant <value_int = 0> ()
    axis_1 = Constant <value_int = 1> ()
    count_1d = Shape (order)
    count = Squeeze (count_1d)
    numbers = Range (axis_0, count, axis_1)
    nothing = ConstantOfShape <value = int64[1] {{0}}> (count_1d)
    inverse = ScatterElements <axis = 0> (nothing, order, numbers)
    unsorted = Gather <axis = 0> (rows, inverse)
    routed = Shape (weights)
    width = Constant <value_ints = [{hidden}]> ()
    by_token_shape = Concat <axis = 0> (routed, width)
    by_token = Reshape <allowzero = 1> (unsorted, by_token_shape)
    by_token_f32 = Cast <to = 1> (by_token)
    weights_f32 = Cast <to = 1> (weights)
    weight_column = Unsqueeze (weights_f32, last)
    shares = Mul (by_token_f32, weight_column)
    sum = ReduceSum <keepdims = 0> (shares, second)
    out = Cast <to = {ONNX_CODE[dtype]}> (sum)
    """


def matmul_text(experts: int, outputs: int, transposed: int, dtype: str, stored: str) -> str:
    """``rows`` [M, A], ``weight``, ``offsets``, ``capacity`` → ``out`` [M, B], ``load`` int32 [1]: gathered
    matrices for M of E or less, else one bucket of C rows per expert."""
    code, kind = ONNX_CODE[dtype], f"{ONNX_TYPE[dtype]}[M, {outputs}]"
    b_weight = f"b_weight = Cast <to = {code}> (weight)" if stored != dtype else ""
    source = "b_weight" if b_weight else "weight"
    b_matrix = "" if transposed else f"b_matrix = Transpose <perm = [0, 2, 1]> ({source})"
    matrix = source if transposed else "b_matrix"
    return f"""
    last = Constant <value_ints = [-1]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    axis_0 = Constant <value_int = 0> ()
    axis_1 = Constant <value_int = 1> ()
    bounds = Cast <to = 6> (offsets)
    edge = Constant <value_ints = [{experts}]> ()
    beyond = Constant <value_ints = [{experts + 1}]> ()
    starts = Slice (bounds, first, edge, first)
    ends = Slice (bounds, second, beyond, first)
    begin = Slice (bounds, first, second, first)
    end = Slice (bounds, edge, beyond, first)
    count_1d = Shape <start = 0, end = 1> (rows)
    count = Squeeze (count_1d)
    numbers_64 = Range (axis_0, count, axis_1)
    numbers = Cast <to = 6> (numbers_64)
    number_column = Unsqueeze (numbers, last)
    passed_bool = LessOrEqual (ends, number_column)
    passed = Cast <to = 6> (passed_bool)
    owner_raw = ReduceSum <keepdims = 0> (passed, second)
    top = Constant <value = int32 {{{experts - 1}}}> ()
    owner = Min (owner_raw, top)
    before = Less (numbers, begin)
    after = GreaterOrEqual (numbers, end)
    absent_flat = Or (before, after)
    absent = Unsqueeze (absent_flat, last)
    zero = Constant <value = float {{0.0}}> ()
    few = Constant <value_int = {experts}> ()
    is_few = LessOrEqual (count, few)
    out, load = If (is_few) <
        then_branch = gather_rows () => ({kind} g_out, int32[1] g_load) {{
            g_raw = Gather <axis = 0> (weight, owner)
            g_matrix = Cast <to = 1> (g_raw)
            g_rows_f32 = Cast <to = 1> (rows)
            g_axis = Constant <value_ints = [{2 if transposed else 1}]> ()
            g_x = Unsqueeze (g_rows_f32, g_axis)
            g_terms = Mul (g_matrix, g_x)
            g_sum_axis = Constant <value_ints = [{1 if transposed else 2}]> ()
            g_sum = ReduceSum <keepdims = 0> (g_terms, g_sum_axis)
            g_present = Where (absent, zero, g_sum)
            g_out = Cast <to = {code}> (g_present)
            g_load = Constant <value = int32[1] {{0}}> ()
        }},
        else_branch = bucket_rows () => ({kind} b_out, int32[1] b_load) {{
            b_counts = Sub (ends, starts)
            b_load = ReduceMax <keepdims = 1> (b_counts, first)
            b_size_64 = Shape (capacity)
            b_size = Cast <to = 6> (b_size_64)
            b_size_0d_64 = Squeeze (b_size_64)
            b_places_64 = Range (axis_0, b_size_0d_64, axis_1)
            b_places = Cast <to = 6> (b_places_64)
            b_start_column = Unsqueeze (starts, last)
            b_sources_any = Add (b_start_column, b_places)
            b_count = Cast <to = 6> (count_1d)
            b_unit = Constant <value = int32[1] {{1}}> ()
            b_highest = Sub (b_count, b_unit)
            b_sources = Min (b_sources_any, b_highest)
            b_rows = Gather <axis = 0> (rows, b_sources)
            {b_weight}
            {b_matrix}
            b_products = MatMul (b_rows, {matrix})
            b_flat_shape = Constant <value_ints = [-1, {outputs}]> ()
            b_flat = Reshape (b_products, b_flat_shape)
            b_start = Gather <axis = 0> (starts, owner)
            b_local = Sub (numbers, b_start)
            b_fits = Less (b_local, b_size)
            b_zero_i = Constant <value = int32 {{0}}> ()
            b_local_low = Max (b_local, b_zero_i)
            b_local_fit = Where (b_fits, b_local_low, b_zero_i)
            b_bucket = Mul (owner, b_size)
            b_slot = Add (b_bucket, b_local_fit)
            b_back = Gather <axis = 0> (b_flat, b_slot)
            b_zero = Cast <to = {code}> (zero)
            b_out = Where (absent, b_zero, b_back)
        }}
    >
    """


def remaining(context: PassContext) -> list[ir.Node]:
    """Dispatch, GroupedMatMul and Combine nodes of the main graph."""
    own = ("Dispatch", "GroupedMatMul", "Combine")
    return [n for n in context.model.graph if n.domain == DOMAIN and n.op_type in own]


def lowered(node: ir.Node, context: PassContext, name: str) -> onnx.FunctionProto | str:
    """The function that does what ``node`` does; or why there is none.

    A GroupedMatMul's has one input more, the capacity, and one output more, the load.
    """

    def function(inputs: str, outputs: str, text: str) -> onnx.FunctionProto:
        return parse_function(name, inputs, outputs, text, context.opset)

    result = str(node.outputs[0].name)
    if node.op_type == "Dispatch":
        text = dispatch_text(node.attributes["num_experts"].as_int())
        return function("expert_ids", "order, offsets, tokens", text)
    dtype = _dtype(node.inputs[0])
    if dtype is None:
        return f"{node.op_type} {result!r}: the dtype of its rows is no float that TensorRT has"
    if node.op_type == "Combine":
        width = node.outputs[0].shape[1] if node.outputs[0].shape is not None else None
        if not isinstance(width, int):
            return f"Combine {result!r}: its width is not known"
        return function("rows, order, weights", "out", combine_text(width, dtype))
    weight = node.inputs[1]
    stored = _dtype(weight)
    shape = weight.shape if weight is not None else None
    sizes = [d for d in shape or () if isinstance(d, int)]
    if stored is None or len(sizes) != 3:
        return f"GroupedMatMul {result!r}: shape or dtype of its weight is not known"
    experts, a, b = sizes
    transposed = node.attributes["transposed"].as_int()
    text = matmul_text(experts, b if transposed else a, transposed, dtype, stored)
    return function("rows, weight, offsets, capacity", "out, load", text)


def _dtype(value: ir.Value | None) -> str | None:
    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
    return names.get(value.dtype.name) if value is not None and value.dtype is not None else None
