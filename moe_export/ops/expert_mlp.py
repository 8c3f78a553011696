"""ExpertMLP: dispatch, both grouped matmuls, activation and combine as one op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import combine, dispatch, grouped_matmul
from .contract import FLOAT_TOLERANCE, FLOAT_TYPES, Attribute, OpContract, Param

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")
LAYOUTS = ("concatenated", "interleaved")


def activate(
    rows: NDArray[Any], *, activation: str, gated: int, layout: str, alpha: float = 1.702, limit: float = 7.0
) -> NDArray[np.float64]:
    """[M, 2I] (gated) or [M, I] → [M, I], float64.

    ``clamped_swiglu`` is gpt-oss's: ``(min(up, limit) clipped to ±limit + 1) * gate * sigmoid(alpha * gate)``
    with ``gate = min(gate, limit)``; the others are ``f(gate) * up`` or ``f(x)``.
    """
    import numpy as np

    x = np.asarray(rows, np.float64)

    def function(v: NDArray[np.float64]) -> NDArray[np.float64]:
        if activation == "silu":
            return np.asarray(v / (1.0 + np.exp(-np.clip(v, -700, 700))))
        if activation == "gelu":
            from math import erf

            return np.asarray(0.5 * v * (1.0 + np.vectorize(erf, otypes=[float])(v / np.sqrt(2.0))))
        if activation == "gelu_tanh":
            return np.asarray(0.5 * v * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (v + 0.044715 * v**3))))
        positive = np.maximum(v, 0.0)
        return positive * positive if activation == "relu2" else positive

    if not gated:
        return function(x)
    if layout == "interleaved":
        gate, up = x[:, 0::2], x[:, 1::2]
    else:
        gate, up = np.split(x, 2, axis=1)
    if activation == "clamped_swiglu":
        gate = np.minimum(gate, limit)
        up = np.clip(up, -limit, limit)
        return np.asarray((up + 1.0) * gate / (1.0 + np.exp(-alpha * gate)))
    return function(gate) * up


def reference(
    hidden: NDArray[Any],
    expert_ids: NDArray[np.int32],
    weights: NDArray[Any],
    up: NDArray[Any],
    down: NDArray[Any],
    up_bias: NDArray[Any] | None = None,
    down_bias: NDArray[Any] | None = None,
    *,
    num_experts: int,
    activation: str = "silu",
    gated: int = 1,
    layout: str = "concatenated",
    transposed: int = 0,
    alpha: float = 1.702,
    limit: float = 7.0,
    biased: int = 0,
    packed: int = 0,
    layer: str = "",
) -> NDArray[np.float64]:
    """The chain Dispatch → GroupedMatMul → activation → GroupedMatMul → Combine in float64: [T, H]."""
    import numpy as np

    if packed:
        from .packing import unpack_down, unpack_up

        up = unpack_up(np.asarray(up), down.shape[2], gated=bool(gated))
        down = unpack_down(np.asarray(down), hidden.shape[1])
    order, offsets, tokens = dispatch.reference(expert_ids, num_experts)
    rows = np.asarray(hidden, np.float64)[tokens]
    owner = np.clip(np.asarray(expert_ids).reshape(-1)[order], 0, num_experts - 1)
    inner = grouped_matmul.reference(rows, up, offsets, transposed)
    if up_bias is not None:
        inner = inner + np.asarray(up_bias, np.float64)[owner]
    inner = activate(inner, activation=activation, gated=gated, layout=layout, alpha=alpha, limit=limit)
    out = grouped_matmul.reference(inner, down, offsets, transposed)
    if down_bias is not None:
        out = out + np.asarray(down_bias, np.float64)[owner]
    present = (np.arange(len(order)) >= offsets[0]) & (np.arange(len(order)) < offsets[-1])
    return combine.reference(np.where(present[:, None], out, 0.0), order, weights)


def activation_lines(attributes: Mapping[str, Any], source: str, target: str) -> str:
    """Body lines that turn ``source`` [M, 2I] or [M, I] (float32) into ``target`` [M, I]."""
    activation, gated = attributes["activation"], attributes["gated"]

    def function(a: str, b: str) -> str:
        return {
            "silu": f"{a}_s = Sigmoid ({a})\n {b} = Mul ({a}, {a}_s)",
            "gelu": f"""{b}_h = Constant <value_float = 0.5> ()
            {b}_1 = Constant <value_float = 1.0> ()
            {b}_r = Constant <value_float = 0.7071067811865476> ()
            {b}_x = Mul ({a}, {b}_r)
            {b}_e = Erf ({b}_x)
            {b}_p = Add ({b}_e, {b}_1)
            {b}_m = Mul ({a}, {b}_p)
            {b} = Mul ({b}_m, {b}_h)""",
            "gelu_tanh": f"""{b}_h = Constant <value_float = 0.5> ()
            {b}_1 = Constant <value_float = 1.0> ()
            {b}_c = Constant <value_float = 0.044715> ()
            {b}_r = Constant <value_float = 0.7978845608028654> ()
            {b}_2 = Mul ({a}, {a})
            {b}_3 = Mul ({b}_2, {a})
            {b}_4 = Mul ({b}_3, {b}_c)
            {b}_5 = Add ({a}, {b}_4)
            {b}_x = Mul ({b}_5, {b}_r)
            {b}_e = Tanh ({b}_x)
            {b}_p = Add ({b}_e, {b}_1)
            {b}_m = Mul ({a}, {b}_p)
            {b} = Mul ({b}_m, {b}_h)""",
            "relu": f"{b} = Relu ({a})",
            "relu2": f"{a}_r = Relu ({a})\n {b} = Mul ({a}_r, {a}_r)",
        }[activation]

    if not gated:
        return function(source, target)
    if attributes["layout"] == "interleaved":
        split = f"""tokens_1d = Shape <start = 0, end = 1> ({source})
        width_1d = Shape <start = 1, end = 2> ({source})
        two = Constant <value_ints = [2]> ()
        half = Div (width_1d, two)
        pairs = Concat <axis = 0> (tokens_1d, half, two)
        paired = Reshape <allowzero = 1> ({source}, pairs)
        first_0d = Constant <value_int = 0> ()
        second_0d = Constant <value_int = 1> ()
        gate = Gather <axis = 2> (paired, first_0d)
        linear = Gather <axis = 2> (paired, second_0d)"""
    else:
        split = f"gate, linear = Split <axis = 1, num_outputs = 2> ({source})"
    if activation == "clamped_swiglu":
        return f"""{split}
        limit_value = Constant <value_float : float = @limit> ()
        alpha_value = Constant <value_float : float = @alpha> ()
        one_f = Constant <value_float = 1.0> ()
        low = Neg (limit_value)
        gate_c = Min (gate, limit_value)
        linear_low = Max (linear, low)
        linear_c = Min (linear_low, limit_value)
        gate_a = Mul (gate_c, alpha_value)
        gate_s = Sigmoid (gate_a)
        glu = Mul (gate_c, gate_s)
        shifted = Add (linear_c, one_f)
        {target} = Mul (shifted, glu)"""
    return f"{split}\n {function('gate', 'gated_value')}\n {target} = Mul (gated_value, linear)"


def _unpacking(gated: bool) -> str:
    """Body lines that turn panels of 64 columns (``packing.py``) back into [E, 2I or I, H] and [E, H, I]."""
    columns = """
    up_pairs_shape = Constant <value_ints = [0, 0, 0, 2, 32]> ()
    up_pairs = Reshape (up_rows, up_pairs_shape)
    up_halves = Transpose <perm = [0, 1, 3, 2, 4]> (up_pairs)
    up_halves_shape = Constant <value_ints = [0, 0, 2, -1]> ()
    up_wide = Reshape (up_halves, up_halves_shape)
    up_axis = Constant <value_ints = [3]> ()
    up_cut = Slice (up_wide, unpack_zero, inner_size, up_axis)
    up_columns = Reshape (up_cut, unpack_shape)
    """
    plain = """
    up_wide = Reshape (up_rows, unpack_shape)
    up_columns = Slice (up_wide, unpack_zero, inner_size, unpack_axis)
    """
    return f"""
    unpack_zero = Constant <value_ints = [0]> ()
    unpack_axis = Constant <value_ints = [2]> ()
    unpack_shape = Constant <value_ints = [0, 0, -1]> ()
    inner_size = Shape <start = 2, end = 3> (down)
    outer_size = Shape <start = 1, end = 2> (hidden)
    up_raw = Cast <to = 1> (up)
    up_rows = Transpose <perm = [0, 2, 1, 3]> (up_raw)
    {columns if gated else plain}
    up_matrix = Transpose <perm = [0, 2, 1]> (up_columns)
    down_raw = Cast <to = 1> (down)
    down_rows_4d = Transpose <perm = [0, 2, 1, 3]> (down_raw)
    down_wide = Reshape (down_rows_4d, unpack_shape)
    down_columns = Slice (down_wide, unpack_zero, outer_size, unpack_axis)
    down_matrix = Transpose <perm = [0, 2, 1]> (down_columns)
    """


def expert_chain(attributes: Mapping[str, Any], up: str, down: str) -> str:
    """Body lines of a whole layer around its two products.

    Args:
        attributes: ``biased``, and those of :func:`activation_lines`.
        up: lines that make ``inner_f32`` of ``rows``, the tokens of each expert in turn (``offsets``). They
            may use the constants ``zero_0d``, ``one_0d`` and ``last_1d``.
        down: lines that make ``outer_f32`` of ``activated``.
    """
    bias_1 = bias_2 = ""
    inner_in, outer_in = "inner_f32", "outer_f32"
    if attributes["biased"]:
        bias_1 = (
            "up_bias_rows = Gather <axis = 0> (up_bias, owner)\n up_bias_f32 = Cast <to = 1> (up_bias_rows)\n"
            " inner_b = Add (inner_f32, up_bias_f32)"
        )
        bias_2 = (
            "down_bias_rows = Gather <axis = 0> (down_bias, owner)\n"
            " down_bias_f32 = Cast <to = 1> (down_bias_rows)\n outer_b = Add (outer_f32, down_bias_f32)"
        )
        inner_in, outer_in = "inner_b", "outer_b"
    return f"""
    order, offsets, tokens = moe_export.Dispatch
        <num_experts : int = @num_experts, drops = 1, layer : string = @layer> (expert_ids)
    hidden_f32 = Cast <to = 1> (hidden)
    rows = Gather <axis = 0> (hidden_f32, tokens)
    last_1d = Constant <value_ints = [-1]> ()
    flat_ids = Reshape (expert_ids, last_1d)
    owner_raw = Gather <axis = 0> (flat_ids, order)
    owner_64 = Cast <to = 7> (owner_raw)
    zero_0d = Constant <value_int = 0> ()
    one_0d = Constant <value_int = 1> ()
    experts = Constant <value_int : int = @num_experts> ()
    highest = Sub (experts, one_0d)
    owner_low = Max (owner_64, zero_0d)
    owner = Min (owner_low, highest)
    {up}
    {bias_1}
    {activation_lines(attributes, inner_in, "activated")}
    {down}
    {bias_2}
    is_low = Less (owner_64, zero_0d)
    is_high = Greater (owner_64, highest)
    absent = Or (is_low, is_high)
    absent_column = Unsqueeze (absent, last_1d)
    zero_f = Constant <value_float = 0.0> ()
    masked = Where (absent_column, zero_f, {outer_in})
    summed = moe_export.Combine (masked, order, weights)
    out = CastLike (summed, hidden)
    """


def body(attributes: Mapping[str, Any], _opset: int) -> str:
    up, down = ("up_matrix", "down_matrix") if attributes["packed"] else ("up", "down")
    t = attributes["transposed"]
    chain = expert_chain(
        attributes,
        f"inner_f32 = moe_export.GroupedMatMul <transposed = {t}> (rows, {up}, offsets)",
        f"outer_f32 = moe_export.GroupedMatMul <transposed = {t}> (activated, {down}, offsets)",
    )
    return f"""
    {_unpacking(bool(attributes["gated"])) if attributes["packed"] else ""}
    {chain}
    """


def _conflict(attributes: Mapping[str, Any]) -> str:
    if attributes["activation"] == "clamped_swiglu" and not attributes["gated"]:
        return "activation clamped_swiglu needs gated 1"
    if attributes["packed"] and (attributes["transposed"] or attributes["layout"] != "concatenated"):
        return "packed 1 needs transposed 0 and layout concatenated"
    return ""


EXPERT_MLP = OpContract(
    name="ExpertMLP",
    summary="All routed experts of one MoE layer: dispatch, up (and gate) projection, activation, down, "
    "combine.",
    inputs=(
        Param("hidden", ("T", "H"), FLOAT_TYPES, "tokens"),
        Param("expert_ids", ("T", "K"), ("int32",), "from Router; negative = dropped"),
        Param("weights", ("T", "K"), ("float32",), "from Router"),
        Param(
            "up",
            ("E", "2I or I", "H"),
            FLOAT_TYPES,
            "gate and up, or up alone; [E, H, 2I] when transposed, [E, U, H, 64] when packed",
        ),
        Param(
            "down",
            ("E", "H", "I"),
            FLOAT_TYPES,
            "down; [E, I, H] when transposed, [E, D, I, 64] when packed",
        ),
        Param("up_bias", ("E", "2I or I"), FLOAT_TYPES, "bias of up", optional=True),
        Param("down_bias", ("E", "H"), FLOAT_TYPES, "bias of down", optional=True),
    ),
    outputs=(Param("out", ("T", "H"), FLOAT_TYPES, "combined expert outputs"),),
    attributes=(
        Attribute("num_experts", int, "number of experts E", minimum=1),
        Attribute(
            "activation", str, "activation function", default="silu", choices=ACTIVATIONS, structural=True
        ),
        Attribute("gated", int, "1: f(gate) * up", default=1, choices=(0, 1), structural=True),
        Attribute(
            "layout",
            str,
            "how gate and up lie in one matrix",
            default="concatenated",
            choices=LAYOUTS,
            structural=True,
        ),
        Attribute("transposed", int, "1: matrices are [in, out]", default=0, choices=(0, 1), structural=True),
        Attribute("alpha", float, "clamped_swiglu: factor in the sigmoid", default=1.702),
        Attribute("limit", float, "clamped_swiglu: clamp", default=7.0),
        Attribute("biased", int, "1: both biases are given", default=0, choices=(0, 1), structural=True),
        Attribute(
            "packed",
            int,
            "1: matrices lie in panels of 64 columns (moe_export/ops/packing.py), which the CPU plugin reads "
            "fastest; needs transposed 0 and layout concatenated",
            default=0,
            choices=(0, 1),
            structural=True,
        ),
        Attribute("layer", str, "name of the MoE layer in the source model", default=""),
    ),
    reference=reference,
    body=body,
    tolerance=FLOAT_TOLERANCE,
    conflict=_conflict,
)
