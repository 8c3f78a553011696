"""The graphs of ranks: together they compute what the whole does; what cannot be divided is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from moe_export.errors import ExportError, UsageError
from moe_export.passes.base import PassContext
from moe_export.passes.divide_experts import DivideExperts
from moe_export.placement import contiguous
from moe_export.schema import ExpertParallel, LayerPlacement
from moe_export.verify.merged_ranks import merge_ranks

from .moe_graphs import (
    EXPERTS,
    HIDDEN,
    SOFTMAX_RENORMALISED,
    context_of,
    layer_text,
    layer_weights,
    model_of,
    tokens,
)

BIASED = layer_text(SOFTMAX_RENORMALISED).replace(
    "expert_active = Relu (expert_inner)",
    """flat = Reshape (ids, last)
    owner = Gather <axis = 0> (flat, order)
    bias_rows = Gather <axis = 0> (bias, owner)
    expert_biased = Add (expert_inner, bias_rows)
    expert_active = Relu (expert_biased)""",
)
"""Looks a bias up by expert; a row of another rank's expert would get one, too."""


def biased() -> PassContext:
    weights = layer_weights()
    inner = weights["up_0"].shape[1]
    weights["bias"] = np.random.default_rng(5).standard_normal((EXPERTS, inner)).astype(np.float32)
    return context_of(model_of(BIASED, weights))


def divided(context: PassContext, plan: ExpertParallel) -> list[onnx.ModelProto]:
    """Each rank's graph."""
    models = []
    for rank in range(plan.ranks):
        own = dataclasses.replace(
            context,
            model=context.model.clone(),
            options={"expert_parallel": plan, "rank": rank, "target": "onnxruntime"},
        )
        DivideExperts().apply(own)
        models.append(ir.to_proto(own.model))
    return models


def plan_of(mode: Any, ranks: int, layers: tuple[LayerPlacement, ...] | None = None) -> ExpertParallel:
    return ExpertParallel(ranks, mode, layers=layers or contiguous([EXPERTS], ranks))


def run(model: onnx.ModelProto, hidden: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["out"], {"hidden": hidden})[0])


REPLICATED = (LayerPlacement(0, ((0, 1, 2, 5), (3, 4, 5), (6, 7, 5))),)
"""Expert 5 is on all three ranks, which have 4, 3 and 3 slots."""


@pytest.mark.parametrize("mode", ["allreduce", "alltoall"])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize(
    ("ranks", "layers"), [(2, None), (3, None), (8, None), (3, REPLICATED)], ids=["2", "3", "8", "replicas"]
)
def test_ranks_together_are_the_whole(
    mode: str, count: int, ranks: int, layers: tuple[LayerPlacement, ...] | None
) -> None:
    context = biased()
    hidden = tokens(count)
    expected = run(ir.to_proto(context.model), hidden)
    plan = plan_of(mode, ranks, layers)
    merged = merge_ranks(divided(context, plan), plan, context.io, context.layers)
    assert not {n.op_type for n in merged.graph.node} & {"AllReduce", "AllToAll"}
    np.testing.assert_allclose(run(merged, hidden), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["allreduce", "alltoall"])
def test_a_rank_that_is_wrong_makes_the_whole_wrong(mode: str) -> None:
    context, hidden = biased(), tokens(7)
    expected = run(ir.to_proto(context.model), hidden)
    plan = plan_of(mode, 2)
    models = divided(context, plan)
    stack = next(t for t in models[1].graph.initializer if len(t.dims) == 3)
    turned = onnx.numpy_helper.to_array(stack)[::-1].copy()
    stack.CopyFrom(onnx.numpy_helper.from_array(turned, stack.name))
    got = run(merge_ranks(models, plan, context.io, context.layers), hidden)
    assert np.abs(got - expected).max() > 1e-2


def test_a_rank_holds_its_experts_only() -> None:
    context = biased()
    for mode in ("allreduce", "alltoall"):
        for rank, model in enumerate(divided(context, plan_of(mode, 3))):
            own = len(contiguous([EXPERTS], 3)[0].experts[rank])
            stacks = [t.dims for t in model.graph.initializer if len(t.dims) == 3]
            assert [dims[0] for dims in stacks] == [own, own]
            biases = [t.dims for t in model.graph.initializer if t.name.startswith("bias")]
            assert [dims[0] for dims in biases] == [own]


def test_what_the_experts_read_besides_cannot_be_sent() -> None:
    text = layer_text(SOFTMAX_RENORMALISED).replace(
        "expert_active = Relu (expert_inner)",
        """all_rows = ReduceSum <keepdims = 0> (hidden, axis_0)
        most = ReduceMax <keepdims = 0> (all_rows)
        expert_scaled = Mul (expert_inner, most)
        expert_active = Relu (expert_scaled)""",
    )
    context = context_of(model_of(text, layer_weights()))
    with pytest.raises(ExportError, match="'layer0': its experts read .* ep_mode allreduce"):
        divided(context, plan_of("alltoall", 2))
    hidden = tokens(5)
    plan = plan_of("allreduce", 2)
    merged = merge_ranks(divided(context, plan), plan, context.io, context.layers)
    np.testing.assert_allclose(run(merged, hidden), run(ir.to_proto(context.model), hidden), atol=1e-5)


def test_weights_that_are_computed_cannot_be_divided() -> None:
    text = layer_text(SOFTMAX_RENORMALISED).replace(
        "expert_inner = moe_export.GroupedMatMul <transposed = 0> (expert_rows, up_0, offsets)",
        """scaled = Neg (up_0)
        expert_inner = moe_export.GroupedMatMul <transposed = 0> (expert_rows, scaled, offsets)""",
    )
    with pytest.raises(ExportError, match="cannot be divided over ranks"):
        divided(context_of(model_of(text, layer_weights())), plan_of("allreduce", 2))


def test_a_model_without_experts_is_refused() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 20]> g (float[tokens, {HIDDEN}] hidden) => '
            f"(float[tokens, {HIDDEN}] out) {{ out = Relu (hidden) }}"
        )
    )
    with pytest.raises(UsageError, match="no MoE layer"):
        divided(context_of(model), plan_of("allreduce", 2))
