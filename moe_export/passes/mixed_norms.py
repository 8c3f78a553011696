"""Norms with a float32 weight inside a float16 model, in a form that ONNX Runtime accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..schema import Decision
from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir


class SplitMixedNorms(Pass):
    """Split a fused sum and norm again where the weight's dtype is not the sum's.

    onnxscript fuses both into SkipSimplifiedLayerNormalization without comparing their dtypes; ONNX Runtime
    refuses the result. The norm alone (SimplifiedLayerNormalization) may have a weight of another dtype.
    Families that keep their norms in float32 (gpt-oss) have such norms in float16.
    """

    name = "split-mixed-norms"

    def _run(self, context: PassContext) -> None:
        mixed = [node for node in context.model.graph if _is_mixed(node)]
        for node in mixed:
            _split(context.model.graph, node)
        if mixed:
            context.decisions.append(
                Decision(
                    "norms with a float32 weight",
                    f"sum and norm apart: {len(mixed)}",
                    "ONNX Runtime's SkipSimplifiedLayerNormalization takes one dtype only",
                )
            )


def _is_mixed(node: ir.Node) -> bool:
    if node.op_type != "SkipSimplifiedLayerNormalization":
        return False
    value, _, weight = node.inputs[:3]
    assert value is not None and weight is not None
    return value.dtype is not None and weight.dtype is not None and value.dtype != weight.dtype


def _split(graph: ir.Graph, node: ir.Node) -> None:
    import onnx_ir as ir

    value, skip, weight, *bias = node.inputs
    assert value is not None and weight is not None
    total = value
    added = []
    for other in (skip, *bias):
        if other is None:
            continue
        add = ir.node("Add", [total, other])
        total = add.outputs[0]
        total.type, total.shape = value.type, value.shape
        added.append(add)
    norm = ir.node(
        "SimplifiedLayerNormalization",
        [total, weight],
        attributes={
            "axis": -1,
            "epsilon": node.attributes.get_float("epsilon", 1e-5),
            "stash_type": int(ir.DataType.FLOAT),
        },
    )
    norm.outputs[0].type, norm.outputs[0].shape = weight.type, value.shape
    graph.insert_before(node, [*added, norm])
    replaced = [(node.outputs[0], norm.outputs[0])]
    if len(node.outputs) > 3:
        replaced.append((node.outputs[3], total))
    for old, new in replaced:
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}.fused", name
    graph.remove(node, safe=True)
