"""Experts whose matrices lie apart in the checkpoint become inputs of their own; nothing is copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..graph.expert_tensors import EXPERT_SCALES, EXPERT_TENSORS
from ..graph.functions import attach_functions
from ..ops import DOMAIN
from ..schema import Decision
from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir


class ExpertMatrices(Pass):
    """``GroupedMatMul`` of a stack that would have to be put together becomes one ``ExpertMatMul`` per part,
    and a ``Concat`` of gate and up."""

    name = "expert-matrices"

    def _run(self, context: PassContext) -> None:
        graph = context.model.graph
        found = [n for n in graph if n.domain == DOMAIN and n.op_type == "GroupedMatMul" and _parts(n)]
        counts = {len(_parts(n)[0]) for n in found}
        if not found:
            return
        if len(counts) > 1:
            context.decisions.append(
                Decision(
                    "expert weights",
                    "stacked, written anew",
                    f"layers have {sorted(counts)} experts, and one ExpertMatMul body serves one number",
                )
            )
            return
        for node in found:
            _replace(graph, node)
        for value in list(graph.initializers.values()):
            held = value.const_value
            if held is not None and EXPERT_TENSORS in held.meta and not value.uses():
                assert value.name is not None
                del graph.initializers[value.name]
        attach_functions(context.model, context.opset)
        context.decisions.append(
            Decision(
                "expert weights",
                "one input per expert's matrix",
                "they lie apart in the checkpoint; a stack would have to be written anew",
            )
        )


def _parts(node: ir.Node) -> tuple[tuple[Any, ...], ...]:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or node.attributes["transposed"].as_int():
        return ()
    parts: tuple[tuple[Any, ...], ...] = weight.const_value.meta.get(EXPERT_TENSORS, ())
    return parts


def _scales(node: ir.Node) -> tuple[Any, ...]:
    """Of each part, the scales of its experts' blocks and the blocks' size, or None."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    found: tuple[Any, ...] = weight.const_value.meta.get(EXPERT_SCALES, (None,) * len(_parts(node)))
    return found


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    import onnx_ir as ir

    rows, offsets, out = node.inputs[0], node.inputs[2], node.outputs[0]
    made = []
    for part, scaled in zip(_parts(node), _scales(node), strict=True):
        matrices = [_initializer(graph, tensor) for tensor in part]
        count = {"num_experts": len(matrices)}
        if scaled is None:
            product = ir.node("ExpertMatMul", [rows, offsets, *matrices], count, domain=DOMAIN)
        else:
            scale, (block_rows, block_columns) = scaled
            product = ir.node(
                "ScaledExpertMatMul",
                [rows, offsets, _initializer(graph, scale), *matrices],
                {**count, "block_rows": block_rows, "block_columns": block_columns},
                domain=DOMAIN,
            )
        product.outputs[0].type = out.type
        made.append(product)
    last = made[-1]
    if len(made) > 1:
        last = ir.node("Concat", [n.outputs[0] for n in made], attributes={"axis": 1})
        made.append(last)
    last.outputs[0].type, last.outputs[0].shape = out.type, out.shape
    graph.insert_before(node, made)
    name = out.name
    out.replace_all_uses_with(last.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.outputs[0].name = name


def _initializer(graph: ir.Graph, tensor: Any) -> ir.Value:
    import onnx_ir as ir

    held = graph.initializers.get(tensor.name)
    if held is not None:
        return held
    value = ir.Value(
        name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
    )
    graph.register_initializer(value)
    return value
