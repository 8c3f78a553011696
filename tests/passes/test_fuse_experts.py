"""Experts become one ExpertMLP node where their activation is proven to be one of the op's, and else stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem
from moe_export.ops import DOMAIN
from moe_export.passes.base import PassContext
from moe_export.passes.fuse_experts import FuseExperts

from .moe_graphs import EXPERTS, HIDDEN, INNER, SOFTMAX_RENORMALISED, context_of, model_of, run, tokens

SPLIT = "gate, linear = Split <axis = 1, num_outputs = 2> (inner)\n"
PAIRS = f"""
    pairs = Constant <value_ints = [0, {INNER}, 2]> ()
    paired = Reshape (inner, pairs)
    first = Constant <value_int = 0> ()
    second = Constant <value_int = 1> ()
    gate = Gather <axis = 2> (paired, first)
    linear = Gather <axis = 2> (paired, second)
"""
ERF = """
    root = Constant <value_float = 1.4142135> ()
    one = Constant <value_float = 1.0> ()
    half = Constant <value_float = 0.5> ()
    scaled = Div (gate, root)
    erf = Erf (scaled)
    shifted = Add (erf, one)
    product = Mul (gate, shifted)
    bent = Mul (product, half)
"""
CLAMPED = """
    limit = Constant <value_float = 7.0> ()
    floor = Constant <value_float = -7.0> ()
    alpha = Constant <value_float = 1.702> ()
    one = Constant <value_float = 1.0> ()
    gate_c = Min (gate, limit)
    linear_c = Clip (linear, floor, limit)
    steep = Mul (gate_c, alpha)
    open = Sigmoid (steep)
    glu = Mul (gate_c, open)
    more = Add (linear_c, one)
    active = Mul (more, glu)
"""
SILU = "open = Sigmoid (gate)\n bent = Mul (gate, open)\n"
GATED = "active = Mul (bent, linear)"

KNOWN = {
    "silu": (SPLIT + SILU + GATED, {"activation": "silu", "gated": 1, "layout": "concatenated"}),
    "silu, interleaved": (PAIRS + SILU + GATED, {"activation": "silu", "layout": "interleaved"}),
    "gelu": (SPLIT + ERF + GATED, {"activation": "gelu", "gated": 1}),
    "clamped": (PAIRS + CLAMPED, {"activation": "clamped_swiglu", "layout": "interleaved", "limit": 7.0}),
    "relu, plain": ("active = Relu (inner)", {"activation": "relu", "gated": 0}),
    "relu squared": ("bent = Relu (inner)\n active = Mul (bent, bent)", {"activation": "relu2", "gated": 0}),
}
OTHER = {
    "gate and up swapped": SPLIT
    + "open = Sigmoid (linear)\n bent = Mul (linear, open)\n active = Mul (bent, gate)",
    "quick gelu": SPLIT + "a = Constant <value_float = 1.702> ()\n s = Mul (gate, a)\n open = Sigmoid (s)\n"
    "bent = Mul (gate, open)\n" + GATED,
    "a leak": "s = LeakyRelu <alpha = 0.0001> (inner)\n active = Identity (s)",
    "a row's own scale": "m = ReduceMax (inner, last)\n b = Relu (inner)\n active = Mul (b, m)",
    "clamped at another place": PAIRS + CLAMPED.replace("Min (gate, limit)", "Clip (gate, floor, limit)"),
}


def layer(activation: str, *, biased: bool = False, transposed: int = 0, after: str = "") -> str:
    bias = """
        flat_ids = Reshape (ids, last)
        owner = Gather <axis = 0> (flat_ids, order)
        up_rows = Gather <axis = 0> (up_bias, owner)
        inner = Add (product_up, up_rows)
    """
    down_bias = "down_rows = Gather <axis = 0> (down_bias, owner)\n outer = Add (product_down, down_rows)"
    return f"""
    logits = MatMul (hidden, router_0)
    {SOFTMAX_RENORMALISED}
    ids = Cast <to = 6> (chosen)
    order, offsets, token_of = moe_export.Dispatch
        <num_experts = {EXPERTS}, drops = 0, layer = "layer0"> (ids)
    expert_rows = Gather <axis = 0> (hidden, token_of)
    product_up = moe_export.GroupedMatMul <transposed = {transposed}> (expert_rows, up_0, offsets)
    {bias if biased else "inner = Identity (product_up)"}
    {activation}
    product_down = moe_export.GroupedMatMul <transposed = {transposed}> (active, down_0, offsets)
    {down_bias if biased else "outer = Identity (product_down)"}
    {after or "last_rows = Identity (outer)"}
    out_0 = moe_export.Combine (last_rows, order, weights)
    """


def context(
    activation: str, *, gated: bool, biased: bool = False, transposed: int = 0, after: str = ""
) -> PassContext:
    import onnx_ir.passes.common as common

    rng = np.random.default_rng(3)
    width = INNER * (2 if gated else 1)
    shapes = {"up_0": (EXPERTS, width, HIDDEN), "down_0": (EXPERTS, HIDDEN, INNER)}
    made: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32)
        made[name] = np.ascontiguousarray(array.swapaxes(1, 2)) if transposed else array
    made["router_0"] = rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32)
    made["up_bias"] = rng.standard_normal((EXPERTS, width)).astype(np.float32)
    made["down_bias"] = rng.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
    model = model_of(layer(activation, biased=biased, transposed=transposed, after=after), made)
    common.IdentityEliminationPass()(model)
    return context_of(model, fused_experts=True)


def ops_of(ctx: PassContext) -> list[str]:
    return [n.op_type for n in ctx.model.graph if n.domain == DOMAIN]


@pytest.mark.parametrize("weights", ["as-is", "packed"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_activation_becomes_one_op_with_the_same_numbers(
    name: str, transposed: int, biased: bool, weights: str
) -> None:
    text, expected = KNOWN[name]
    kind = {"gated": "gate" in text}
    plain = context(text, **kind, biased=biased, transposed=transposed)
    fused = context(text, **kind, biased=biased, transposed=transposed)
    fused.options = {**fused.options, "expert_weights": weights}
    FuseExperts().apply(fused)
    assert ops_of(fused) == ["ExpertMLP"], fused.decisions
    node = next(n for n in fused.model.graph if n.op_type == "ExpertMLP")
    attributes = {k: a.value for k, a in node.attributes.items()}
    if weights == "packed":
        expected = {**expected, "layout": "concatenated", "packed": 1, "transposed": 0}
        assert "packed in panels" in fused.decisions[-1].reason
    assert attributes.items() >= expected.items() and attributes["biased"] == int(biased)
    assert fused.fused == (0,) and fused.decisions[-1].choice.startswith("one ExpertMLP")
    for count in (1, 7, 40):
        hidden = tokens(count)
        names = ("out", "moe.0.output", "moe.0.weights")
        for got, want in zip(run(fused.model, hidden, names), run(plain.model, hidden, names), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OTHER)
def test_another_activation_stays_as_it_is(name: str) -> None:
    ctx = context(OTHER[name], gated="gate" in OTHER[name])
    FuseExperts().apply(ctx)
    assert ops_of(ctx) == ["Dispatch", "GroupedMatMul", "GroupedMatMul", "Combine"]
    assert (
        ctx.fused == () and ctx.decisions[-1].choice == "apart" and "activation" in ctx.decisions[-1].reason
    )


def test_what_follows_the_down_projection_keeps_the_experts_apart() -> None:
    ctx = context(KNOWN["silu"][0], gated=True, after="last_rows = Neg (outer)")
    FuseExperts().apply(ctx)
    assert "ExpertMLP" not in ops_of(ctx)
    assert "between its down projection and the weighted sum" in ctx.decisions[-1].reason


def test_without_the_plugin_nothing_is_fused() -> None:
    ctx = context(KNOWN["silu"][0], gated=True)
    ctx.options = {}
    FuseExperts().apply(ctx)
    assert "ExpertMLP" not in ops_of(ctx) and not ctx.decisions


@pytest.mark.skipif(bool(cpu_plugin_problem()), reason="needs the CPU plugin")
def test_biased_experts_of_a_real_model_become_one_op(tmp_path: Path) -> None:
    """gpt-oss adds a bias per expert to both products; torch looks it up by GatherND, not Gather."""
    import moe_export
    from moe_export.models.families import tiny_model

    bundle = moe_export.build(tiny_model("gpt_oss"), tmp_path / "bundle", bench=False, threads=1)
    chosen = {d.subject: d.choice for d in bundle.manifest.decisions if d.subject.endswith(": experts")}
    assert set(chosen.values()) == {"one ExpertMLP op of the CPU plugin"} and len(chosen) == 2
    assert bundle.manifest.evidence["parity"]["passed"]
