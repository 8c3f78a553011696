"""Routers are recognised in every parametrisation and however written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_export.errors import UsageError
from moe_export.ops import OPS
from moe_export.passes.attach_router import AttachRouter

from .moe_graphs import (
    EXPERTS,
    SOFTMAX_RENORMALISED,
    TOP_K,
    context_of,
    inlined_router,
    layer_text,
    layer_weights,
    model_of,
    one_layer,
    run,
    tokens,
)
from .router_texts import BIAS, PLAIN, attach, renamed, same_results, scalar

WRITTEN_OTHERWISE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "softmax by hand": (
        """top = ReduceMax <keepdims = 1> (logits, last)
        shifted = Sub (logits, top)
        exponent = Exp (shifted)
        all = ReduceSum <keepdims = 1> (exponent, last)
        scores = Div (exponent, all)
        weights, chosen = TopK <axis = -1> (scores, k)""",
        {},
        {"score": "softmax", "renormalize": 0},
    ),
    "top-k, then softmax": (
        "best, chosen = TopK <axis = -1> (logits, k)\n weights = Softmax <axis = -1> (best)",
        {},
        {"score": "softmax_after_topk"},
    ),
    "softmax of all, chosen unsorted": (
        """scores = Softmax <axis = -1> (logits)
        best, chosen = TopK <axis = -1, sorted = 0> (logits, k)
        picked = GatherElements <axis = 1> (scores, chosen)
        all = ReduceSum <keepdims = 1> (picked, last)
        weights = Div (picked, all)""",
        {},
        {"score": "softmax_after_topk"},
    ),
    "times a factor": (
        PLAIN + "all = ReduceSum <keepdims = 1> (best, last)\n normal = Div (best, all)\n"
        "weights = Mul (factor, normal)",
        {"factor": scalar(2.5)},
        {"score": "softmax", "renormalize": 1, "scale": 2.5},
    ),
    "sigmoid with epsilon": (
        """scores = Sigmoid (logits)
        best, chosen = TopK <axis = -1> (scores, k)
        sum = ReduceSum <keepdims = 1> (best, last)
        all = Add (sum, epsilon)
        weights = Div (best, all)""",
        {"epsilon": scalar(1e-9)},
        {"score": "sigmoid", "renormalize": 1, "epsilon": float(np.float32(1e-9))},
    ),
    "sigmoid, bias for selection": (
        """scores = Sigmoid (logits)
        biased = Add (bias, scores)
        best, chosen = TopK <axis = -1> (biased, k)
        weights = GatherElements <axis = 1> (scores, chosen)""",
        {"bias": BIAS},
        {"score": "sigmoid", "biased": 1},
    ),
    "bias of shape [1, E]": (
        """scores = Sigmoid (logits)
        biased = Add (scores, bias)
        best, chosen = TopK <axis = -1> (biased, k)
        weights = GatherElements <axis = 1> (scores, chosen)""",
        {"bias": BIAS[None]},
        {"score": "sigmoid", "biased": 1},
    ),
    "bias of the gate itself": (
        "gate = Add (logits, bias)\n scores = Softmax <axis = -1> (gate)\n"
        "weights, chosen = TopK <axis = -1> (scores, k)",
        {"bias": BIAS},
        {"score": "softmax", "renormalize": 0, "biased": 0},
    ),
    "scaled logits": (
        "gate = Mul (logits, factor)\n scores = Softmax <axis = -1> (gate)\n"
        "weights, chosen = TopK <axis = -1> (scores, k)",
        {"factor": scalar(0.3)},
        {"score": "softmax", "renormalize": 0},
    ),
    "logits clamped at 30": (
        "low = Max (logits, minus)\n gate = Min (low, plus)\n"
        + PLAIN.replace("(logits)", "(gate)")
        + "weights = Identity (best)",
        {"minus": scalar(-30), "plus": scalar(30)},
        {"score": "softmax"},
    ),
    "logits clamped at 1000": (
        "gate = Clip (logits, minus, plus)\n best, chosen = TopK <axis = -1> (gate, k)\n"
        "weights = Softmax <axis = -1> (best)",
        {"minus": scalar(-1000), "plus": scalar(1000)},
        {"score": "softmax_after_topk"},
    ),
    "soft cap at 50000": (
        """small = Div (logits, cap)
        bent = Tanh (small)
        gate = Mul (bent, cap)
        best, chosen = TopK <axis = -1> (gate, k)
        weights = Softmax <axis = -1> (best)""",
        {"cap": scalar(50000)},
        {"score": "softmax_after_topk"},
    ),
    "a clamp that no score reaches": (
        PLAIN
        + "sum = ReduceSum <keepdims = 1> (best, last)\n all = Max (sum, tiny)\n weights = Div (best, all)",
        {"tiny": scalar(1e-12)},
        {"score": "softmax", "renormalize": 1},
    ),
}

VARIANTS: list[dict[str, Any]] = [
    {"score": "softmax"},
    {"score": "softmax", "renormalize": 1},
    {"score": "softmax", "scale": 1.5, "n_group": 2, "topk_group": 1, "group_mask": "zero"},
    {"score": "softmax", "n_group": 2, "topk_group": 1},
    {"score": "softmax", "biased": 1, "renormalize": 1},
    {"score": "sigmoid"},
    {"score": "sigmoid", "renormalize": 1, "epsilon": 1e-6, "scale": 2.5},
    {"score": "sigmoid", "biased": 1, "n_group": 2, "topk_group": 1, "group_score": "top2_sum"},
    {
        "score": "sigmoid",
        "biased": 1,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "top2_sum",
        "group_mask": "zero",
    },
    {"score": "softmax_after_topk"},
    {"score": "softmax_after_topk", "biased": 1},
    {"score": "sqrtsoftplus", "renormalize": 1, "biased": 1, "scale": 1.5},
]


@pytest.mark.parametrize("attributes", VARIANTS, ids=str)
def test_each_parametrisation_is_recognised(attributes: dict[str, Any]) -> None:
    more = {"selection_bias": BIAS} if attributes.get("biased") else {}
    context, before = attach(inlined_router(**attributes), more)
    layer = context.layers[0]
    assert layer.router is not None, layer.router_note
    full = OPS["Router"].complete({"top_k": TOP_K, "layer": "layer0", **attributes})
    full["epsilon"] = float(np.float32(full["epsilon"]))
    assert {k: layer.router[k] for k in full} == full
    assert layer.logits == "moe.0.logits"
    assert ("selection_bias" in layer.router) == bool(attributes.get("biased"))
    same_results(context, before)


@pytest.mark.parametrize("name", WRITTEN_OTHERWISE)
def test_the_same_function_in_other_words_is_recognised(name: str) -> None:
    router, more, expected = WRITTEN_OTHERWISE[name]
    context, before = attach(router, more)
    found = context.layers[0].router
    assert found is not None, context.layers[0].router_note
    assert {k: found[k] for k in expected} == expected
    same_results(context, before)
    (old,), (new,) = (run(m, tokens(30, scale=3000.0)) for m in (before, context.model))
    assert np.allclose(old, new, rtol=1e-5, atol=1e-2)


def test_what_is_done_to_the_logits_first_stays() -> None:
    for name, op in (("logits clamped at 1000", "Clip"), ("soft cap at 50000", "Tanh")):
        router, more, _ = WRITTEN_OTHERWISE[name]
        context, _ = attach(router, more)
        assert [n.op_type for n in context.model.graph if n.op_type in (op, "Router")] == [op, "Router"]


def test_what_the_pass_leaves() -> None:
    context, _ = attach(SOFTMAX_RENORMALISED, drops=1)
    nodes = {n.op_type: n for n in context.model.graph}
    assert list(nodes)[:3] == ["Identity", "MatMul", "Router"]
    assert not {"Softmax", "TopK", "Div", "ReduceSum"} & set(nodes)
    assert nodes["Dispatch"].attributes["drops"].as_int() == 0, "a Router without capacity drops nothing"
    assert ("moe_export", "Router", "") in context.model.functions
    assert context.decisions[0].subject == "layer0"
    assert context.decisions[0].choice == "Router op"
    ids, weights, logits = run(
        context.model, tokens(9), ("moe.0.expert_ids", "moe.0.weights", "moe.0.logits")
    )
    want_weights, want_ids = OPS["Router"].reference(logits, top_k=TOP_K, renormalize=1)
    assert np.array_equal(ids, want_ids) and np.allclose(weights, want_weights, atol=1e-6)


def test_float16() -> None:
    router = (
        "wide = Cast <to = 1> (logits)\n"
        + PLAIN.replace("(logits)", "(wide)")
        + """
    sum = ReduceSum <keepdims = 1> (best, last)
    weights = Div (best, sum)"""
    )
    context = one_layer(router, dtype="float16")
    AttachRouter().apply(context)
    assert context.layers[0].router is not None, context.layers[0].router_note


def test_float16_with_a_bias() -> None:
    router = """wide = Cast <to = 1> (logits)
    wide_bias = Cast <to = 1> (bias)
    scores = Sigmoid (wide)
    biased = Add (wide_bias, scores)
    best, chosen = TopK <axis = -1> (biased, k)
    weights = GatherElements <axis = 1> (scores, chosen)"""
    context = one_layer(router, more={"bias": BIAS}, dtype="float16")
    AttachRouter().apply(context)
    layer = context.layers[0]
    assert layer.router is not None, layer.router_note
    assert layer.router["biased"] == 1
    assert layer.router["selection_bias"] == BIAS.astype(np.float16).astype(np.float32).tolist()
    hidden = tokens(9, "float16")
    ids, weights, logits = run(context.model, hidden, ("moe.0.expert_ids", "moe.0.weights", "moe.0.logits"))
    want_weights, want_ids = OPS["Router"].reference(
        logits, BIAS.astype(np.float16), top_k=TOP_K, score="sigmoid", biased=1
    )
    assert np.array_equal(ids, want_ids) and np.allclose(
        weights, want_weights, atol=2e-3
    )  # ORT keeps more than float16


def test_a_capacity_is_not_covered_by_the_proof() -> None:
    router = (
        PLAIN
        + """
    flat = Reshape (chosen, last)
    running = CumSum (flat, zero_0d)
    by_token = Reshape (running, shape)
    full = Greater (by_token, limit)
    weights = Where (full, none, best)"""
    )
    more = {
        "zero_0d": np.array(0, np.int64),
        "shape": np.array([-1, TOP_K], np.int64),
        "limit": np.array(10**9, np.int64),
        "none": scalar(0.0),
    }
    context, _ = attach(router, more)
    assert context.layers[0].router_note == "the router uses CumSum, which the proof does not cover"


def test_routing_by_more_than_the_logits() -> None:
    router = (
        PLAIN
        + """
    size = ReduceSum <keepdims = 1> (hidden, last)
    factor = Sigmoid (size)
    weights = Mul (best, factor)"""
    )
    context, _ = attach(router)
    assert context.layers[0].router is None
    assert "more than the router logits" in context.layers[0].router_note


def test_logits_of_three_axes() -> None:
    router = """cube = Reshape (logits, three)
    wide = Softmax <axis = -1> (cube)
    best, places = TopK <axis = -1> (wide, k)
    weights = Reshape (best, two)
    chosen = Reshape (places, two)"""
    more = {"three": np.array([-1, 1, EXPERTS], np.int64), "two": np.array([-1, TOP_K], np.int64)}
    context, before = attach(router, more)
    assert context.layers[0].router is not None, "the logits before the reshape have two axes"
    same_results(context, before)
    text = layer_text(router.replace("cube = Reshape (logits, three)", "cube = Identity (logits)"))
    text = text.replace("MatMul (hidden, router_0)", "MatMul (hidden_3d, router_0)")
    model = model_of("hidden_3d = Unsqueeze (hidden, one_1d)\n" + text, {**layer_weights(), **more})
    context = context_of(model)
    AttachRouter().apply(context)
    assert context.layers[0].router is None
    assert "3 axes" in context.layers[0].router_note


def test_two_vectors_of_one_number_per_expert() -> None:
    router = """gate = Mul (logits, gain)
    summed = Add (gate, bias)
    scores = Softmax <axis = -1> (summed)
    weights, chosen = TopK <axis = -1> (scores, k)"""
    more = {"bias": BIAS, "gain": BIAS + 3}
    context, before = attach(router, more)
    assert context.layers[0].router is not None, "found behind the vectors"
    same_results(context, before)
    context, _ = attach(
        router.replace("weights, chosen", "best, chosen")
        + """
    own = Gather <axis = 0> (gain, chosen)
    weights = Mul (own, best)""",
        more,
    )
    assert context.layers[0].router is None


def test_a_router_whose_nodes_onnx_runtime_refuses() -> None:
    router = PLAIN + "weights = Mul (best, factor)"
    context = one_layer(router, more={"factor": scalar(2.0)})
    topk = next(n for n in context.model.graph if n.op_type == "TopK")
    from onnx_ir import AttrInt64

    topk.attributes["axis"] = AttrInt64("axis", 7)
    AttachRouter().apply(context)
    assert "cannot be run alone" in context.layers[0].router_note


def test_layers_of_two_kinds() -> None:
    second = WRITTEN_OTHERWISE["sigmoid, bias for selection"][0]
    text = layer_text(SOFTMAX_RENORMALISED) + renamed(layer_text(second, index=1, hidden="out_0"))
    model = model_of(text, {**layer_weights(), **layer_weights(1), "bias": BIAS}, result="out_1")
    context = context_of(model)
    before = context.model.clone()
    AttachRouter().apply(context)
    assert context.layers[0].router is not None
    assert context.layers[1].router is None
    assert "one body cannot serve both" in context.layers[1].router_note
    same_results(context, before)


def test_two_layers_of_one_kind_share_the_body() -> None:
    text = layer_text(SOFTMAX_RENORMALISED) + renamed(
        layer_text(SOFTMAX_RENORMALISED, index=1, hidden="out_0")
    )
    model = model_of(text, {**layer_weights(), **layer_weights(1)}, result="out_1")
    context = context_of(model)
    before = context.model.clone()
    AttachRouter().apply(context)
    assert [layer.router is not None for layer in context.layers] == [True, True]
    assert [layer.logits for layer in context.layers] == ["moe.0.logits", "moe.1.logits"]
    same_results(context, before)


def test_logits_that_the_model_returns_keep_their_name() -> None:
    model = model_of(
        layer_text(SOFTMAX_RENORMALISED), layer_weights(), outputs=f", float[tokens, {EXPERTS}] logits"
    )
    context = context_of(model)
    before = context.model.clone()
    AttachRouter().apply(context)
    assert context.layers[0].router is not None
    assert [v.name for v in context.model.graph.outputs] == ["out", "logits"]
    hidden = tokens(5)
    for old, new in zip(
        run(before, hidden, ("out", "logits")), run(context.model, hidden, ("out", "logits")), strict=True
    ):
        assert np.allclose(old, new, atol=1e-6)
    assert np.array_equal(
        run(context.model, hidden, ("moe.0.logits",))[0], run(before, hidden, ("logits",))[0]
    )


def test_a_router_op_already_there_is_taken_over() -> None:
    text = layer_text(
        "weights, chosen_32 = moe_export.Router <top_k = 2> (logits)\n chosen = Identity (chosen_32)"
    )
    text = text.replace("ids = Cast <to = 6> (chosen)", "").replace("(ids)", "(chosen_32)")
    context = context_of(model_of(text, layer_weights()))
    AttachRouter().apply(context)
    layer = context.layers[0]
    assert layer.router is not None and layer.router["top_k"] == 2 and layer.logits == "moe.0.logits"
    assert layer.router_note == "the model states the Router op"
    run(context.model, tokens(4), ("moe.0.logits", "moe.0.expert_ids"))


def test_router_with_wrong_attributes_is_refused() -> None:
    text = layer_text('weights, chosen = moe_export.Router <top_k = 2, score = "softmx"> (logits)')
    with pytest.raises(UsageError, match=r"Router\.score: unknown value 'softmx'"):
        model_of(text, layer_weights())
