"""Exchange between ranks as NVIDIA's DistCollective nodes, which TensorRT's parser makes layers of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ops import DOMAIN
from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir

OP = "DistCollective"


class DistCollectives(Pass):
    """Every AllReduce and AllToAll of ours becomes a DistCollective with a name of its own, by which a built
    plan is searched for it: one that TensorRT drops would be a rank on its own."""

    name = "dist-collectives"

    def _run(self, context: PassContext) -> None:
        graph = context.model.graph
        found = [n for n in graph if n.domain == DOMAIN and n.op_type in ("AllReduce", "AllToAll")]
        for number, node in enumerate(found):
            _replace(graph, node, f"moe.exchange.{number}")


def collective_names(model: ir.Model) -> list[str]:
    """Names of a model's exchanges, in order."""
    return [str(node.name) for node in model.graph if node.op_type == OP]


def _replace(graph: ir.Graph, node: ir.Node, name: str) -> None:
    import onnx_ir as ir

    reduces = node.op_type == "AllReduce"
    attributes = {
        "collective_operation": "all_reduce" if reduces else "all_to_all",
        "reduce_op": node.attributes["reduce"].as_string() if reduces else "none",
        "root": -1,
        "nb_rank": node.attributes["ranks"].as_int(),
    }
    made = ir.node(OP, [node.inputs[0]], attributes=attributes, name=name)
    old, new = node.outputs[0], made.outputs[0]
    new.type, new.shape, new.name = old.type, old.shape, old.name
    graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
