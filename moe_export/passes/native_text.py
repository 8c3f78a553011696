"""One MoE layer's experts in plain ONNX that TensorRT builds, as text of an ONNX function.

T tokens, K experts per token, M = T*K assignments, E experts, H hidden, I intermediate, W = 2I or I.

- ``gather`` ("mr"): gather each assignment's matrices, multiply, sum. TensorRT fuses the three into one
  kernel that reads a matrix where it lies: the form for few tokens, which reads only what they use.
- ``buckets``: each expert's tokens in a bucket of C rows, one batched product over all experts. C is the
  length of an input, so the host chooses it; ``max_load`` tells the fullest expert, and where it is more than
  C the result is void and the host runs again with more.
- ``dense``: every expert on every token, then a weighted sum: E/K times the arithmetic.

None uses NonZero, a scatter that adds, or TopK, which TensorRT lacks or limits. Sums over H, I and K are
float32 in ``gather``; the products of the other two are the matrix units' own, in the dtype of ``hidden``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ops.expert_mlp import activation_lines

if TYPE_CHECKING:
    import onnx

ONNX_CODE = {"float32": 1, "float16": 10, "bfloat16": 16}
ONNX_TYPE = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}
INPUTS = ("hidden", "expert_ids", "weights", "up", "down")
BIASES = ("up_bias", "down_bias")
CAPACITY = "capacity"


@dataclass(frozen=True)
class NativeForm:
    """What the text depends on. ``attributes``: ExpertMLP's, complete. ``drops``: ids may lie outside 0..E-1.

    ``dtype``: of ``hidden`` and of the result; ``weight_dtype``: of the matrices and biases.
    """

    attributes: Mapping[str, Any]
    top_k: int
    hidden: int
    inner: int
    dtype: str
    weight_dtype: str
    drops: bool
    computed: str = "float32"
    """What the products are computed in once every pass has run: decides predicted times, not the text."""
    routed_over: int = 0
    """Of a rank: experts of all ranks, which decide how many tokens each gets; 0: all are here."""

    @property
    def experts(self) -> int:
        return int(self.attributes["num_experts"])

    @property
    def everywhere(self) -> int:
        """Experts of all ranks."""
        return max(self.routed_over, self.experts)

    @property
    def spread(self) -> float:
        """E/K: of how many tokens one goes to an expert."""
        return self.everywhere / self.top_k

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the function's inputs without the capacity."""
        return (*INPUTS, *(BIASES if self.attributes["biased"] else ()))


def gather_text(form: NativeForm) -> str:
    """Lines that make ``g_out`` [T, H] and ``g_load`` int32 [1] = 0."""
    t = form.attributes["transposed"]
    owner, mask = "expert_ids", ""
    if form.drops:
        owner = "g_owner"
        mask = f"""
        g_zero_i = Constant <value = int32 {{0}}> ()
        g_top_i = Constant <value = int32 {{{form.experts - 1}}}> ()
        g_low = Less (expert_ids, g_zero_i)
        g_high = Greater (expert_ids, g_top_i)
        g_absent = Or (g_low, g_high)
        g_raised = Max (expert_ids, g_zero_i)
        g_owner = Min (g_raised, g_top_i)
        """
    product = _biased_names(form)
    return f"""
    {mask}
    g_last = Constant <value_ints = [-1]> ()
    g_second = Constant <value_ints = [1]> ()
    g_tokens = Cast <to = 1> (hidden)
    g_x_axes = Constant <value_ints = [1, {3 if t else 2}]> ()
    g_x = Unsqueeze (g_tokens, g_x_axes)
    {_product("g_up", "up", owner, "g_x", product("g_inner"), t)}
    {_row_bias("g_inner", "up_bias", owner, form)}
    {_activation("g_inner", "g_active", "g_", form)}
    g_a_axes = Constant <value_ints = [{3 if t else 2}]> ()
    g_a = Unsqueeze (g_active, g_a_axes)
    {_product("g_down", "down", owner, "g_a", product("g_outer"), t)}
    {_row_bias("g_outer", "down_bias", owner, form)}
    {_weighted("g_outer", "g_absent" if form.drops else None, "g_", form)}
    g_load = Constant <value = int32[1] {{0}}> ()
    """


def _product(prefix: str, matrix: str, owner: str, row: str, target: str, transposed: int) -> str:
    """``target`` [T, K, out] = the owner's matrix times ``row`` ([.., 1, in] or, transposed, [.., in, 1])."""
    return f"""
    {prefix}_raw = Gather <axis = 0> ({matrix}, {owner})
    {prefix}_matrix = Cast <to = 1> ({prefix}_raw)
    {prefix}_terms = Mul ({prefix}_matrix, {row})
    {prefix}_axis = Constant <value_ints = [{2 if transposed else 3}]> ()
    {target} = ReduceSum <keepdims = 0> ({prefix}_terms, {prefix}_axis)
    """


def _biased_names(form: NativeForm) -> Callable[[str], str]:
    """What a product is called before its bias is added: itself where there is none."""
    return lambda target: f"{target}_product" if form.attributes["biased"] else target


def _row_bias(target: str, bias: str, owner: str, form: NativeForm) -> str:
    if not form.attributes["biased"]:
        return ""
    return f"""
    {target}_bias_raw = Gather <axis = 0> ({bias}, {owner})
    {target}_bias = Cast <to = 1> ({target}_bias_raw)
    {target} = Add ({target}_product, {target}_bias)
    """


def _activation(source: str, target: str, prefix: str, form: NativeForm) -> str:
    """``source`` [., ., W] → ``target`` [., ., I], float32. Halves are taken by Reshape and Gather: a Split
    would make TensorRT keep two copies of the matrix."""
    attributes = {**form.attributes, "gated": 0}
    if not form.attributes["gated"]:
        return activation_lines(attributes, source, target)
    interleaved = form.attributes["layout"] == "interleaved"
    shape, axis = (f"{form.inner}, 2", 3) if interleaved else (f"2, {form.inner}", 2)
    halves = f"""
    {prefix}pair_shape = Constant <value_ints = [0, 0, {shape}]> ()
    {prefix}pair = Reshape ({source}, {prefix}pair_shape)
    {prefix}half_0 = Constant <value_int = 0> ()
    {prefix}half_1 = Constant <value_int = 1> ()
    {prefix}gate = Gather <axis = {axis}> ({prefix}pair, {prefix}half_0)
    {prefix}linear = Gather <axis = {axis}> ({prefix}pair, {prefix}half_1)
    """
    if form.attributes["activation"] == "clamped_swiglu":
        limit, alpha = (f"{form.attributes[name]:.9g}" for name in ("limit", "alpha"))
        return f"""{halves}
        {prefix}limit = Constant <value = float {{{limit}}}> ()
        {prefix}floor = Constant <value = float {{-{limit}}}> ()
        {prefix}alpha = Constant <value = float {{{alpha}}}> ()
        {prefix}unit = Constant <value = float {{1.0}}> ()
        {prefix}gate_c = Min ({prefix}gate, {prefix}limit)
        {prefix}linear_low = Max ({prefix}linear, {prefix}floor)
        {prefix}linear_c = Min ({prefix}linear_low, {prefix}limit)
        {prefix}gate_a = Mul ({prefix}gate_c, {prefix}alpha)
        {prefix}gate_s = Sigmoid ({prefix}gate_a)
        {prefix}glu = Mul ({prefix}gate_c, {prefix}gate_s)
        {prefix}shifted = Add ({prefix}linear_c, {prefix}unit)
        {target} = Mul ({prefix}shifted, {prefix}glu)"""
    return f"""{halves}
    {activation_lines(attributes, f"{prefix}gate", f"{prefix}bent")}
    {target} = Mul ({prefix}bent, {prefix}linear)"""


def _weighted(rows: str, absent: str | None, prefix: str, form: NativeForm) -> str:
    """``<prefix>out`` [T, H] = the sum over K of ``rows`` [T, K, H] (float32) times ``weights``; absent ones
    count nothing, whatever their row holds."""
    masked, mask = rows, ""
    if absent is not None:
        masked = f"{prefix}present"
        mask = f"""
        {prefix}absent_column = Unsqueeze ({absent}, {prefix}last)
        {prefix}nothing = Constant <value = float {{0.0}}> ()
        {prefix}present = Where ({prefix}absent_column, {prefix}nothing, {rows})
        """
    return f"""
    {mask}
    {prefix}weights = Cast <to = 1> (weights)
    {prefix}weight_column = Unsqueeze ({prefix}weights, {prefix}last)
    {prefix}shares = Mul ({masked}, {prefix}weight_column)
    {prefix}sum = ReduceSum <keepdims = 0> ({prefix}shares, {prefix}second)
    {prefix}out = Cast <to = {ONNX_CODE[form.dtype]}> ({prefix}sum)
    """


def buckets_text(form: NativeForm) -> str:
    """Lines that make ``b_out`` [T, H] and ``b_load`` int32 [1], the fullest expert, from ``capacity`` [C].

    T of 1 or more. An assignment's place in its bucket is the number of earlier ones of its expert.
    """
    experts = form.experts
    return f"""
    b_last = Constant <value_ints = [-1]> ()
    b_first = Constant <value_ints = [0]> ()
    b_second = Constant <value_ints = [1]> ()
    b_axis_0 = Constant <value_int = 0> ()
    b_axis_1 = Constant <value_int = 1> ()
    b_zero = Constant <value = int32[1] {{0}}> ()
    b_one = Constant <value = int32[1] {{1}}> ()
    b_experts = Constant <value = int32[{experts}] {{{", ".join(str(e) for e in range(experts))}}}> ()
    b_flat = Reshape (expert_ids, b_last)
    b_column = Unsqueeze (b_flat, b_last)
    b_hit_bool = Equal (b_column, b_experts)
    b_hit = Cast <to = 6> (b_hit_bool)
    b_running = CumSum (b_hit, b_axis_0)
    b_counts = ReduceSum <keepdims = 0> (b_hit, b_first)
    b_load = ReduceMax <keepdims = 1> (b_counts, b_first)
    b_own = Mul (b_running, b_hit)
    b_number = ReduceSum <keepdims = 0> (b_own, b_second)
    b_size_64 = Shape (capacity)
    b_size = Cast <to = 6> (b_size_64)
    b_fits = LessOrEqual (b_number, b_size)
    b_mine = Greater (b_number, b_zero)
    b_placed = And (b_fits, b_mine)
    b_bucket = Mul (b_flat, b_size)
    b_behind = Add (b_bucket, b_number)
    b_slot = Sub (b_behind, b_one)
    b_experts_64 = Constant <value_ints = [{experts}]> ()
    b_slots_64 = Mul (b_experts_64, b_size_64)
    b_slots = Cast <to = 6> (b_slots_64)
    b_target = Where (b_placed, b_slot, b_slots)
    b_one_64 = Constant <value_ints = [1]> ()
    b_room = Add (b_slots_64, b_one_64)
    b_nobody = ConstantOfShape <value = int32[1] {{0}}> (b_room)
    b_count_64 = Shape <start = 0, end = 1> (hidden)
    b_count = Squeeze (b_count_64)
    b_tokens_64 = Range (b_axis_0, b_count, b_axis_1)
    b_tokens = Cast <to = 6> (b_tokens_64)
    b_token_column = Unsqueeze (b_tokens, b_last)
    b_ids_shape = Shape (expert_ids)
    b_token_rows = Expand (b_token_column, b_ids_shape)
    b_token = Reshape (b_token_rows, b_last)
    b_filled = ScatterElements <axis = 0> (b_nobody, b_target, b_token)
    b_source = Slice (b_filled, b_first, b_slots_64, b_first)
    b_gathered = Gather <axis = 0> (hidden, b_source)
    b_width = Constant <value_ints = [{form.hidden}]> ()
    b_shape = Concat <axis = 0> (b_experts_64, b_size_64, b_width)
    b_rows = Reshape (b_gathered, b_shape)
    {_experts("b_rows", "b_", form)}
    b_flat_shape = Constant <value_ints = [-1, {form.hidden}]> ()
    b_outer_rows = Reshape (b_outer, b_flat_shape)
    b_read = Where (b_placed, b_slot, b_zero)
    b_back_rows = Gather <axis = 0> (b_outer_rows, b_read)
    b_back_shape = Constant <value_ints = [-1, {form.top_k}, {form.hidden}]> ()
    b_back = Reshape (b_back_rows, b_back_shape)
    b_missing_flat = Not (b_placed)
    b_missing = Reshape (b_missing_flat, b_ids_shape)
    {_weighted("b_back", "b_missing" if form.drops else None, "b_", form)}
    """


def _experts(rows: str, prefix: str, form: NativeForm) -> str:
    """``<prefix>outer`` float32 [E, C, H] from ``rows`` [E, C, H] (or [T, H]): both products and what lies
    between."""
    code = ONNX_CODE[form.dtype]
    product = _biased_names(form)

    def matmul(left: str, matrix: str, bias: str, target: str) -> str:
        lines, right = "", matrix
        if form.weight_dtype != form.dtype:
            lines, right = f"{prefix}{matrix}_own = Cast <to = {code}> ({matrix})", f"{prefix}{matrix}_own"
        if not form.attributes["transposed"]:
            lines += f"\n {prefix}{matrix}_matrix = Transpose <perm = [0, 2, 1]> ({right})"
            right = f"{prefix}{matrix}_matrix"
        lines += f"""
        {target}_own = MatMul ({left}, {right})
        {product(target)} = Cast <to = 1> ({target}_own)
        """
        if form.attributes["biased"]:
            lines += f"""
            {target}_bias_raw = Unsqueeze ({bias}, {prefix}second)
            {target}_bias = Cast <to = 1> ({target}_bias_raw)
            {target} = Add ({target}_product, {target}_bias)
            """
        return lines

    return f"""
    {matmul(rows, "up", "up_bias", f"{prefix}inner")}
    {_activation(f"{prefix}inner", f"{prefix}active_f32", prefix, form)}
    {prefix}active = Cast <to = {code}> ({prefix}active_f32)
    {matmul(f"{prefix}active", "down", "down_bias", f"{prefix}outer")}
    """


def dense_text(form: NativeForm) -> str:
    """Lines that make ``d_out`` [T, H]: all experts on all tokens, an expert's weight 0 where a token did not
    choose it."""
    experts = form.experts
    return f"""
    d_last = Constant <value_ints = [-1]> ()
    d_first = Constant <value_ints = [0]> ()
    d_second = Constant <value_ints = [1]> ()
    d_experts = Constant <value = int32[{experts}] {{{", ".join(str(e) for e in range(experts))}}}> ()
    d_ids = Unsqueeze (expert_ids, d_last)
    d_hit = Equal (d_ids, d_experts)
    d_weights_f32 = Cast <to = 1> (weights)
    d_weight_column = Unsqueeze (d_weights_f32, d_last)
    d_nothing = Constant <value = float {{0.0}}> ()
    d_spread = Where (d_hit, d_weight_column, d_nothing)
    d_by_token = ReduceSum <keepdims = 0> (d_spread, d_second)
    d_by_expert = Transpose <perm = [1, 0]> (d_by_token)
    d_share = Unsqueeze (d_by_expert, d_last)
    d_hit_i = Cast <to = 6> (d_hit)
    d_hits = ReduceSum <keepdims = 0> (d_hit_i, d_second)
    d_hits_by_expert = Transpose <perm = [1, 0]> (d_hits)
    d_none = Constant <value = int32 {{0}}> ()
    d_chosen_flat = Greater (d_hits_by_expert, d_none)
    d_chosen = Unsqueeze (d_chosen_flat, d_last)
    {_experts("hidden", "d_", form)}
    d_present = Where (d_chosen, d_outer, d_nothing)
    d_shares = Mul (d_present, d_share)
    d_sum = ReduceSum <keepdims = 0> (d_shares, d_first)
    d_out = Cast <to = {ONNX_CODE[form.dtype]}> (d_sum)
    """


def both_text(form: NativeForm, threshold: int) -> str:
    """``out`` [T, H] and ``load``: ``gather`` for T of ``threshold`` or less, else ``buckets``.

    Measured on TensorRT-RTX 1.7: matrices that are constants are kept once, and those that are inputs of the
    network are copied into the branch; both branches must give [T, H] by the same symbols (with rows cut to
    ``threshold`` in one of them the build of a whole model fails).
    """
    kind = f"{ONNX_TYPE[form.dtype]}[T, {form.hidden}]"
    return f"""
    tokens_1d = Shape <start = 0, end = 1> (hidden)
    tokens = Squeeze (tokens_1d)
    few = Constant <value_int = {threshold}> ()
    is_few = LessOrEqual (tokens, few)
    out, load = If (is_few) <
        then_branch = gather_experts () => ({kind} g_out, int32[1] g_load) {{
            {gather_text(form)}
        }},
        else_branch = bucket_experts () => ({kind} b_out, int32[1] b_load) {{
            {buckets_text(form)}
        }}
    >
    """


LOWERINGS = ("gather", "buckets", "both", "dense")
NATIVE_DOMAIN = "moe_export_native"
"""Of the functions made here. They are inlined at once: no model keeps one."""


def uses_buckets(lowering: str) -> bool:
    """Whether the lowering has a capacity that the host chooses."""
    return lowering in ("buckets", "both")


def native_function(
    form: NativeForm, lowering: str, threshold: int, opset: int, name: str
) -> onnx.FunctionProto:
    """The layer's experts as an ONNX function: :attr:`NativeForm.inputs` (and ``capacity``) → ``out`` (and
    ``load``)."""
    inputs, outputs = form.inputs, "out"
    if uses_buckets(lowering):
        inputs, outputs = (*inputs, CAPACITY), "out, load"
    if lowering == "both":
        text = both_text(form, threshold)
    else:
        prefix, text = {
            "gather": ("g", gather_text(form)),
            "buckets": ("b", buckets_text(form)),
            "dense": ("d", dense_text(form)),
        }[lowering]
        text = text.replace(f"{prefix}_out = ", "out = ")
        text = text.replace("b_load = ", "load = ")
    return parse_function(name, ", ".join(inputs), outputs, text, opset)


def parse_function(name: str, inputs: str, outputs: str, text: str, opset: int) -> onnx.FunctionProto:
    """``text`` as a function of the native domain, called ``name`` (anything)."""
    import onnx.parser

    made = onnx.parser.parse_function(
        f'<domain: "{NATIVE_DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"body ({inputs}) => ({outputs})\n{{\n{text}\n}}"
    )
    made.name = name
    return made
