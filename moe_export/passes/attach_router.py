"""Replace a router's plain nodes by one Router op, where running both on hard inputs proves them equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..graph.functions import attach_functions
from ..graph.moe_values import find_value, name_value
from ..graph.subgraph import ancestors, extract
from ..ops import DOMAIN, OPS, VERSION
from ..schema import Decision, MoELayer
from .base import Pass, PassContext
from .router_candidates import expert_vectors, fit_scale, logit_candidates, parameters
from .router_proof import (
    WEIGHT_TOLERANCE,
    CannotRun,
    Cases,
    Runner,
    constants,
    foreign_operators,
    hard_biases,
    hard_logits,
    nodes_runner,
    op_runner,
    proves,
    routes_each_token_alone,
)

if TYPE_CHECKING:
    import onnx_ir as ir

PROVEN = "equal to the Router op on ties, masked experts, extreme logits and biases, and around its constants"


class AttachRouter(Pass):
    """For each MoE layer: find the logits, name what leads from them to the routing, prove it, replace it."""

    name = "attach-router"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        layers = []
        chosen: tuple[Any, ...] | None = None
        for layer in context.layers:
            found, note = self._attach(context, layer, chosen)
            if found is not None:
                chosen = OPS["Router"].variant(found)
            layers.append(
                dataclasses.replace(
                    layer,
                    router=None if found is None else {**found, **_held_bias(context.model, layer)},
                    router_note=note,
                    logits=None if found is None else f"moe.{layer.index}.logits",
                )
            )
            context.decisions.append(
                Decision(
                    subject=layer.name or f"moe.{layer.index}",
                    choice="Router op" if found is not None else "router as plain nodes",
                    reason=note,
                )
            )
        context.layers = tuple(layers)
        if chosen is not None:
            context.model.graph.opset_imports[DOMAIN] = VERSION
            # Once for all layers: both go over the whole graph.
            common.RemoveUnusedNodesPass()(context.model)
            attach_functions(context.model, context.model.graph.opset_imports[""])

    def _attach(
        self, context: PassContext, layer: MoELayer, variant: tuple[Any, ...] | None
    ) -> tuple[dict[str, Any] | None, str]:
        """Attributes of the Router op now in the graph, or None, and why."""
        model = context.model
        ids, weights = find_value(model, layer.expert_ids), find_value(model, layer.weights)
        assert ids is not None and weights is not None
        producer = ids.producer()
        if producer is not None and producer.domain == DOMAIN and producer.op_type == "Router":
            assert producer.inputs[0] is not None
            name_value(model, producer.inputs[0], f"moe.{layer.index}.logits")
            attributes = OPS["Router"].complete({k: a.value for k, a in producer.attributes.items()})
            return attributes, "the model states the Router op"
        reasons = []
        for logits in logit_candidates(model, ids, weights, layer.num_experts):
            found, reason = _recognise(context, layer, logits, ids, weights)
            if found is None:
                reasons.append(reason)
                continue
            attributes, bias = found
            if variant is not None and OPS["Router"].variant(attributes) != variant:
                return None, "differs in form from the model's other routers; one body cannot serve both"
            _replace(model, layer, logits, ids, weights, attributes, bias)
            return attributes, PROVEN
        return None, reasons[0] if reasons else "no single logits value [T, E] leads to the routing"


def _held_bias(model: ir.Model, layer: MoELayer) -> dict[str, list[float]]:
    """The selection bias of the layer's Router op, for the manifest: near ties are judged with it.

    Empty without a bias, and for one that is computed rather than stored.
    """
    import numpy as np

    ids = find_value(model, layer.expert_ids)
    node = None if ids is None else ids.producer()
    if node is None or len(node.inputs) < 2:
        return {}
    bias = node.inputs[1]
    cast = None if bias is None else bias.producer()
    if cast is not None and cast.op_type in ("Cast", "Reshape", "Identity"):
        bias = cast.inputs[0]
    if bias is None or bias.const_value is None:
        return {}
    held = bias.const_value.numpy().astype(np.float32).reshape(-1)
    return {"selection_bias": held.tolist()} if held.size == layer.num_experts else {}


_Found = tuple[dict[str, Any], "ir.Value | None"]


def _recognise(
    context: PassContext, layer: MoELayer, logits: ir.Value, ids: ir.Value, weights: ir.Value
) -> tuple[_Found | None, str]:
    """Router attributes and selection bias that the nodes from ``logits`` on are proven to be, or None and
    why."""
    nodes, _ = ancestors([ids, weights], [logits])
    rank = len(logits.shape) if logits.shape is not None else 0
    if rank != 2:
        return (
            None,
            f"router logits of {logits.name} have {rank} axes: routing depends on more than the token",
        )
    if foreign := foreign_operators(nodes):
        return None, f"the router uses {', '.join(foreign)}, which the proof does not cover"
    vectors = expert_vectors(nodes, layer.num_experts)
    if len(vectors) > 1:
        return None, "the router uses several vectors of one number per expert"
    bias = vectors[0] if vectors else None
    piece = extract(context.model, [logits], [ids, weights], [bias] if bias is not None else [])
    if piece is None:
        return None, "the routing depends on more than the router logits"
    assert logits.dtype is not None
    dtype = "float16" if "FLOAT16" in logits.dtype.name else "float32"
    plain = nodes_runner(piece, logits, ids, weights, bias)
    try:
        return _search(context, layer, plain, nodes, bias, dtype)
    except CannotRun as error:
        return None, f"the router's nodes cannot be run alone: {error}"


def _search(
    context: PassContext,
    layer: MoELayer,
    plain: Runner,
    nodes: Sequence[ir.Node],
    bias: ir.Value | None,
    dtype: str,
) -> tuple[_Found | None, str]:
    import numpy as np

    tolerance = WEIGHT_TOLERANCE[dtype]
    numbers = constants(nodes)
    biases: tuple[Any, ...] = (np.zeros(layer.num_experts, np.float32),)
    if bias is not None and bias.const_value is not None:
        biases = hard_biases(bias.const_value.numpy().reshape(-1), numbers)
    base = biases[0]
    cases = Cases(hard_logits(layer.num_experts, dtype, numbers), biases)
    probe = cases.logits[0]
    wanted = plain({"logits": probe, "bias": base})
    if wanted[0].ndim != 2 or wanted[0].shape != (len(probe), layer.top_k):
        return None, f"the routing of {len(probe)} tokens has shape {list(wanted[0].shape)}, expected [T, K]"
    if not routes_each_token_alone(plain, cases, tolerance):
        return None, "a token's routing depends on the other tokens"
    for attributes in parameters(layer.top_k, layer.num_experts, nodes, numbers, bias is not None):
        weights, ids = OPS["Router"].reference(probe, base if attributes["biased"] else None, **attributes)
        scale = fit_scale(wanted, (ids, weights), numbers, tolerance)
        if scale is None:
            continue
        full = OPS["Router"].complete({**attributes, "scale": scale, "layer": layer.name})
        if proves(plain, op_runner(full, context.opset, dtype), cases, tolerance):
            return (full, bias if full["biased"] else None), ""
    return (
        None,
        "no Router parameters give the same routing on hard inputs (ties, masked experts, extreme logits)",
    )


def _replace(
    model: ir.Model,
    layer: MoELayer,
    logits: ir.Value,
    ids: ir.Value,
    weights: ir.Value,
    attributes: dict[str, Any],
    bias: ir.Value | None,
) -> None:
    import onnx_ir as ir

    logits = name_value(model, logits, f"moe.{layer.index}.logits")
    producer = logits.producer()
    assert producer is not None
    if bias is not None and bias.const_value is not None and len(bias.const_value.shape) != 1:
        held = bias.const_value.numpy().reshape(-1)
        name = f"moe.{layer.index}.selection_bias"
        bias = ir.Value(name=name, const_value=ir.tensor(held, name=name), type=bias.type)
        bias.shape = ir.Shape([layer.num_experts])
        model.graph.register_initializer(bias)
    node = ir.node("Router", [logits, bias, None], attributes=attributes, domain=DOMAIN, num_outputs=2)
    for old, new in ((weights, node.outputs[0]), (ids, node.outputs[1])):
        new.type, new.shape = old.type, old.shape
        name = str(old.name)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, name
    model.graph.insert_after(producer, node)
    _promise_no_drops(node)


def _promise_no_drops(router: ir.Node) -> None:
    """A Router without capacity drops nothing, so neither need the Dispatch that reads it provide for it."""
    import onnx_ir as ir

    for node, _ in router.outputs[1].uses():
        if node.domain == DOMAIN and node.op_type == "Dispatch":
            node.attributes["drops"] = ir.AttrInt64("drops", 0)
