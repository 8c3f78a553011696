"""For TensorRT's plugin, experts become one node its parser can take; by its body it still runs anywhere."""

from __future__ import annotations

import numpy as np
import pytest

from moe_export.graph.functions import PLUGIN_ATTRIBUTES, attach_functions
from moe_export.ops import DOMAIN
from moe_export.passes.base import PassContext
from moe_export.passes.plugin_experts import PluginExperts

from .moe_graphs import OPSET, context_of, layer_text, layer_weights, model_of, one_layer, run, tokens
from .moe_graphs import SOFTMAX_RENORMALISED as ROUTER


def lowered(context: PassContext, lowering: str = "plugin") -> PassContext:
    context.options = {**context.options, "expert_lowering": lowering}
    PluginExperts().apply(context)
    return context


def test_one_node_with_the_parsers_attributes_and_the_same_numbers() -> None:
    context = one_layer()
    before = run(context.model, tokens(9))
    lowered(context)
    (node,) = [n for n in context.model.graph if n.domain == DOMAIN]
    assert node.op_type == "ExpertMLP"
    assert {k: node.attributes[k].as_string() for k in PLUGIN_ATTRIBUTES} == PLUGIN_ATTRIBUTES
    # TensorRT refuses a node with a missing input.
    assert len(node.inputs) == 5 and all(v is not None for v in node.inputs)
    np.testing.assert_allclose(run(context.model, tokens(9))[0], before[0], atol=1e-5)
    assert context.fused == (0,)
    (decision,) = context.decisions
    assert decision.choice == "GPU plugin ExpertMLP" and "relu" in decision.reason


def test_a_later_pass_may_attach_bodies_again() -> None:
    context = lowered(one_layer())
    attach_functions(context.model, OPSET)
    (node,) = [n for n in context.model.graph if n.domain == DOMAIN]
    assert node.attributes["plugin_namespace"].as_string() == "moe_export"


def test_nothing_happens_unless_asked_for() -> None:
    context = lowered(one_layer(), "auto")
    assert all(n.op_type != "ExpertMLP" for n in context.model.graph)
    assert not context.decisions


def test_every_layer_of_a_model() -> None:
    text = layer_text(ROUTER) + "\n" + second_layer()
    model = model_of(text, {**layer_weights(0), **layer_weights(1)}, result="out_1")
    context = lowered(context_of(model))
    assert [n.op_type for n in context.model.graph if n.domain == DOMAIN] == ["ExpertMLP"] * 2
    assert context.fused == (0, 1)


def second_layer() -> str:
    """The second layer with value names of its own."""
    text = layer_text(ROUTER, index=1, hidden="out_0")
    for name in (
        "logits",
        "scores",
        "best",
        "chosen",
        "total",
        "weights",
        "ids",
        "order",
        "offsets",
        "token_of",
    ):
        text = text.replace(f" {name},", f" {name}_b,").replace(f" {name} ", f" {name}_b ")
        text = text.replace(f"({name},", f"({name}_b,").replace(f"({name})", f"({name}_b)")
        text = text.replace(f" {name})", f" {name}_b)")
    for name in ("expert_rows", "expert_inner", "expert_active", "expert_out"):
        text = text.replace(name, f"{name}_b")
    return text


def test_an_unproven_activation_stays_apart_and_says_why() -> None:
    text = layer_text(ROUTER).replace("Relu (expert_inner)", "Tanh (expert_inner)")
    context = lowered(context_of(model_of(text, layer_weights())))
    assert all(n.op_type != "ExpertMLP" for n in context.model.graph)
    (decision,) = context.decisions
    assert decision.choice == "no plugin" and decision.reason


@pytest.mark.parametrize("broken", ["up_0", "down_0"])
def test_the_comparison_sees_other_weights(broken: str) -> None:
    context = one_layer()
    before = run(context.model, tokens(9))[0]
    other = one_layer(more={broken: -layer_weights()[broken]})
    assert np.abs(run(lowered(other).model, tokens(9))[0] - before).max() > 1e-2
