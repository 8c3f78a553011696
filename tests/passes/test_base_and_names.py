"""What must hold after every pass, and the names of MoE values that everything else reads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from moe_export.errors import ExportError, UsageError
from moe_export.graph.functions import attach_functions
from moe_export.graph.moe_values import find_value, name_moe_values, rename_moe_values
from moe_export.graph.names import duplicate_names, rename
from moe_export.ops import DOMAIN, VERSION
from moe_export.passes.base import Pass, PassContext
from moe_export.passes.pipelines import PIPELINES, run_pipeline

from .moe_graphs import (
    EXPERTS,
    HIDDEN,
    SOFTMAX_RENORMALISED,
    context_of,
    layer_text,
    layer_weights,
    model_of,
    one_layer,
    run,
    tokens,
)
from .router_texts import renamed


class _Broken(Pass):
    name = "broken"

    def __init__(self, breaking: Callable[[PassContext], None]) -> None:
        self._breaking = breaking

    def _run(self, context: PassContext) -> None:
        self._breaking(context)


def _rename_output(context: PassContext) -> None:
    context.model.graph.outputs[0].name = "result"


def _swap_inputs(context: PassContext) -> None:
    context.model.graph.inputs.append(ir.Value(name="more"))


def _lose_value(context: PassContext) -> None:
    value = find_value(context.model, "moe.0.weights")
    assert value is not None
    value.name = "weights"


def _double_name(context: PassContext) -> None:
    nodes = list(context.model.graph)
    nodes[1].outputs[0].name = nodes[2].outputs[0].name


def _float_ids(context: PassContext) -> None:
    value = find_value(context.model, "moe.0.expert_ids")
    assert value is not None
    value.dtype = ir.DataType.FLOAT


def _no_body(context: PassContext) -> None:
    del context.model.functions[("moe_export", "Combine", "")]


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (_rename_output, "pass 'broken' changed the model's outputs"),
        (_swap_inputs, "pass 'broken' changed the model's inputs"),
        (_lose_value, r"pass 'broken' lost the value 'moe\.0\.weights' of MoE layer 'layer0'"),
        (_double_name, "pass 'broken' gave the name '.*' to two values"),
        (_float_ids, r"pass 'broken' made 'moe\.0\.expert_ids' FLOAT, no integers"),
        (_no_body, "pass 'broken' left a Combine node without its function body"),
    ],
)
def test_a_broken_pass_is_caught(breaking: Callable[[PassContext], None], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        _Broken(breaking).apply(one_layer())


def test_a_pass_that_does_nothing_passes() -> None:
    _Broken(lambda context: None).apply(one_layer())


def test_an_op_without_a_body_is_left_without_one() -> None:
    context = one_layer()
    node = ir.node("AllReduce", [context.model.graph.outputs[0]], {"ranks": 2}, domain=DOMAIN)
    node.outputs[0].name = "all"
    context.model.graph.append(node)
    attach_functions(context.model, context.opset)
    _Broken(lambda context: None).apply(context)
    assert (DOMAIN, "AllReduce", "") not in context.model.functions
    assert (DOMAIN, "Combine", "") in context.model.functions
    assert node.attributes["reduce"].value == "sum"
    alone = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": context.opset}), ir_version=10)
    alone.graph.append(ir.node("CheckCapacity", [None, None], domain=DOMAIN))
    attach_functions(alone, context.opset)
    assert not alone.functions and alone.graph.opset_imports[DOMAIN] == VERSION


def test_lost_logits_are_caught() -> None:
    from dataclasses import replace

    def claim(context: PassContext) -> None:
        context.layers = tuple(replace(layer, logits="moe.0.logits") for layer in context.layers)

    with pytest.raises(ExportError, match=r"lost the value 'moe\.0\.logits'"):
        _Broken(claim).apply(one_layer())


def test_unknown_target_lists_the_choices() -> None:
    with pytest.raises(UsageError, match="unknown target 'onnxruntim'; nearest: onnxruntime"):
        run_pipeline("onnxruntim", one_layer())
    assert set(PIPELINES) == {"portable", "onnxruntime", "tensorrt", "tensorrt-rtx"}


@pytest.mark.parametrize("target", sorted(PIPELINES))
def test_every_pipeline_keeps_values_and_results(target: str) -> None:
    context = one_layer(drops=1)
    before = context.model.clone()
    run_pipeline(target, context)
    layer = context.layers[0]
    assert layer.logits == "moe.0.logits"
    names = (layer.hidden, layer.expert_ids, layer.weights, layer.output)
    for number in (0, 1, 21):
        hidden = tokens(number)
        for old, new in zip(run(before, hidden, names), run(context.model, hidden, names), strict=True):
            assert np.allclose(old, new, atol=1e-5)
        assert np.allclose(run(before, hidden)[0], run(context.model, hidden)[0], atol=1e-5)


def test_names_and_sizes_of_a_layer() -> None:
    (layer,) = one_layer().layers
    assert (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size) == (
        EXPERTS,
        2,
        HIDDEN,
        5,
    )
    assert [layer.hidden, layer.expert_ids, layer.weights, layer.output] == [
        f"moe.0.{n}" for n in ("hidden", "expert_ids", "weights", "output")
    ]
    assert layer.logits is None and layer.router is None
    (transposed,) = one_layer(transposed=1).layers
    assert (transposed.hidden_size, transposed.intermediate_size) == (HIDDEN, 5)


def test_values_hold_what_their_names_say() -> None:
    context = one_layer()
    hidden = tokens(7)
    found, ids, weights, output = run(
        context.model, hidden, tuple(f"moe.0.{n}" for n in ("hidden", "expert_ids", "weights", "output"))
    )
    assert np.array_equal(found, hidden)
    assert ids.dtype == np.int32 and ids.shape == weights.shape == (7, 2)
    assert np.allclose(weights.sum(1), 1.0)
    assert np.array_equal(output, run(context.model, hidden)[0])


def test_parameters_called_like_moe_values_move_aside() -> None:
    model = model_of(layer_text(SOFTMAX_RENORMALISED), layer_weights())
    for plain, hostile in (
        ("up_0", "moe.0.weights"),
        ("down_0", "moe.0.output"),
        ("router_0", "moe.const.0"),
    ):
        rename(model, model.graph.initializers[plain], hostile)
    context = context_of(model)
    want = run(one_layer().model, tokens(8))[0]
    assert duplicate_names(context.model) == []
    assert "source.moe.0.weights" in context.model.graph.initializers
    assert np.allclose(run(context.model, tokens(8))[0], want, atol=1e-6)
    run_pipeline("onnxruntime", context)
    assert np.allclose(run(context.model, tokens(8))[0], want, atol=1e-5)


def test_an_output_called_like_a_moe_value_is_refused() -> None:
    model = model_of(layer_text(SOFTMAX_RENORMALISED), layer_weights())
    model.graph.outputs[0].name = "moe.0.output"
    with pytest.raises(ExportError, match=r"'moe\.0\.output' is the name of an input or output"):
        name_moe_values(model)


def test_moe_values_that_are_outputs_keep_both_names() -> None:
    text = layer_text(SOFTMAX_RENORMALISED) + "routed = Identity (ids)"
    model = model_of(text, layer_weights(), outputs=", int32[tokens, 2] ids, float[tokens, 2] weights")
    context = context_of(model)
    assert [v.name for v in context.model.graph.outputs] == ["out", "ids", "weights"]
    names = ("ids", "moe.0.expert_ids", "weights", "moe.0.weights")
    ids, same_ids, weights, same_weights = run(context.model, tokens(4), names)
    assert np.array_equal(ids, same_ids) and np.array_equal(weights, same_weights)
    run_pipeline("onnxruntime", context)
    ids, same_ids, _, _ = run(context.model, tokens(4), names)
    assert np.array_equal(ids, same_ids)


def _two(second: str, **weights: np.ndarray) -> PassContext:
    text = layer_text(SOFTMAX_RENORMALISED) + renamed(second) + "\nboth = Add (out_0, out_1)\n"
    return context_of(model_of(text, {**layer_weights(), **layer_weights(1), **weights}, result="both"))


def test_two_layers_on_one_hidden_state() -> None:
    context = _two(layer_text(SOFTMAX_RENORMALISED, index=1))
    assert [layer.hidden for layer in context.layers] == ["moe.0.hidden", "moe.1.hidden"]
    first, second = run(context.model, tokens(5), ("moe.0.hidden", "moe.1.hidden"))
    assert np.array_equal(first, second)
    before = context.model.clone()
    run_pipeline("onnxruntime", context)
    assert np.allclose(run(context.model, tokens(5))[0], run(before, tokens(5))[0], atol=1e-5)
    run(context.model, tokens(5), ("moe.0.hidden", "moe.1.hidden"))


def test_two_layers_with_one_routing() -> None:
    second = layer_text(SOFTMAX_RENORMALISED, index=1)
    second = second[second.index("order, offsets") :].replace("(ids)", "(shared_ids)")
    second = second.replace("order, weights", "order, shared_weights")
    text = layer_text(SOFTMAX_RENORMALISED) + renamed(second).replace("shared_ids", "ids").replace(
        "shared_weights", "weights"
    )
    model = model_of(
        text + "\nboth = Add (out_0, out_1)\n", {**layer_weights(), **layer_weights(1)}, result="both"
    )
    context = context_of(model)
    names = tuple(f"moe.{i}.{n}" for i in (0, 1) for n in ("expert_ids", "weights"))
    ids_0, weights_0, ids_1, weights_1 = run(context.model, tokens(6), names)
    assert np.array_equal(ids_0, ids_1) and np.array_equal(weights_0, weights_1)
    before = context.model.clone()
    for target in sorted(PIPELINES):
        new = PassContext(before.clone(), context.io, context.layers, "float32", 20)
        run_pipeline(target, new)
        assert np.allclose(run(new.model, tokens(6))[0], run(before, tokens(6))[0], atol=1e-5)
        run(new.model, tokens(6), names)


def test_runs_of_one_block_get_names_of_their_own() -> None:
    context = _two(layer_text(SOFTMAX_RENORMALISED, index=1, hidden="out_0", name="layer0"))
    assert [layer.name for layer in context.layers] == ["layer0", "layer0#2"]
    before = context.model.clone()
    run_pipeline("onnxruntime", context)
    names = ("moe.0.expert_ids", "moe.1.expert_ids", "moe.0.output", "moe.1.output")
    for old, new in zip(run(before, tokens(9), names), run(context.model, tokens(9), names), strict=True):
        assert np.allclose(old, new, atol=1e-5)


def test_the_second_layer_is_measured_by_its_own_matrices() -> None:
    """The way back from Combine to the last matmul does not stray into the layer before."""
    second = layer_text(SOFTMAX_RENORMALISED, index=1, hidden="out_0").replace(
        "out_1 = moe_export.Combine (expert_out, order",
        """flat = Reshape (ids, last)
        owner = Gather <axis = 0> (flat, order)
        bias_rows = Gather <axis = 0> (bias, owner)
        expert_biased = Add (expert_out, bias_rows)
        out_1 = moe_export.Combine (expert_biased, order""",
    )
    wide = {
        "up_1": np.ones((EXPERTS, 11, HIDDEN), np.float32),
        "down_1": np.ones((EXPERTS, HIDDEN, 11), np.float32),
        "bias": np.ones((EXPERTS, HIDDEN), np.float32),
    }
    context = _two(second, **wide)
    assert [layer.intermediate_size for layer in context.layers] == [5, 11]


def test_values_are_found_again_after_a_rewrite_took_their_names() -> None:
    context = _two(layer_text(SOFTMAX_RENORMALISED, index=1, hidden="out_0"))
    want = run(context.model, tokens(3), ("moe.1.expert_ids", "moe.0.output"))
    for name in ("moe.1.expert_ids", "moe.0.output", "moe.0.weights"):
        value = find_value(context.model, name)
        assert value is not None
        value.name = f"rewritten_{name}"
    rename_moe_values(context.model, context.layers)
    for old, new in zip(
        want, run(context.model, tokens(3), ("moe.1.expert_ids", "moe.0.output")), strict=True
    ):
        assert np.array_equal(old, new)


def test_a_rewrite_that_removes_a_layer_is_named() -> None:
    context = one_layer()
    dispatch = next(n for n in context.model.graph if n.op_type == "Dispatch")
    dispatch.attributes["layer"] = ir.AttrString("layer", "other")
    with pytest.raises(ExportError, match="MoE layer 'layer0': a rewrite removed its Dispatch"):
        rename_moe_values(context.model, context.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("moe_export.Combine (expert_out, order, weights)", "MatMul (weights, router_0)"),
            "lacks .* its Combine",
        ),
        (("Gather <axis = 0> (hidden, token_of)", "Gather <axis = 1> (hidden, token_of)"), None),
    ],
)
def test_a_layer_of_another_shape_is_refused(change: tuple[str, str], message: str | None) -> None:
    text = layer_text(SOFTMAX_RENORMALISED)
    assert change[0] in text
    if message is None:
        return
    with pytest.raises(ExportError, match=message):
        context_of(model_of(text.replace(*change), layer_weights()))
