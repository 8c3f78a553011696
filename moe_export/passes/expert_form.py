"""What a layer's experts compute, read off its plain nodes: weights, biases, and the activation, proven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..graph.moe_values import ExpertNodes, expert_nodes
from ..ops import DOMAIN, OPS
from .activation_proof import find_activation
from .base import PassContext

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class ExpertForm:
    """A layer's experts as ExpertMLP's inputs and attributes, and the nodes that such a node replaces."""

    nodes: ExpertNodes
    weights: tuple[ir.Value, ir.Value]
    """Up and down; each a constant."""
    biases: tuple[ir.Value | None, ir.Value | None]
    attributes: dict[str, Any]


def find_form(context: PassContext, name: str) -> ExpertForm | str:
    """The layer's experts as one op, or why they are not."""
    graph = context.model.graph
    dispatch = next(
        n
        for n in graph
        if n.domain == DOMAIN and n.op_type == "Dispatch" and n.attributes["layer"].as_string() == name
    )
    nodes = expert_nodes(dispatch)
    matmuls = [n for n, _ in dispatch.outputs[1].uses()]
    if len(matmuls) != 2 or any(n.op_type != "GroupedMatMul" for n in matmuls):
        return "it has not two grouped products"
    up, down = nodes.first.inputs[1], nodes.last.inputs[1]
    if up is None or down is None or up.const_value is None or down.const_value is None:
        return "its weights are computed in the graph, not constants"
    transposed = nodes.first.attributes["transposed"].as_int()
    if transposed != nodes.last.attributes["transposed"].as_int():
        return "its two weights lie in different ways"
    inner, up_bias = _biased(nodes.first.outputs[0])
    outer, down_bias = _before_bias(nodes.combine.inputs[0])
    rows = nodes.last.inputs[0]
    if outer is not nodes.last.outputs[0]:
        return "something is computed between its down projection and the weighted sum"
    if (up_bias is None) != (down_bias is None):
        return "it has one bias of two"
    assert rows is not None
    width = up.const_value.shape.numpy()[2 if transposed else 1]
    intermediate = down.const_value.shape.numpy()[1 if transposed else 2]
    activation, reason = find_activation(context.model, inner, rows, width, intermediate)
    if activation is None:
        return reason
    attributes = {
        **activation,
        "num_experts": dispatch.attributes["num_experts"].as_int(),
        "transposed": transposed,
        "biased": int(up_bias is not None),
        "layer": name,
    }
    return ExpertForm(nodes, (up, down), (up_bias, down_bias), OPS["ExpertMLP"].complete(attributes))


def _biased(product: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The product with its experts' biases added, and the biases [E, .]; the product itself without."""
    users = [node for node, _ in product.uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        source, bias = _before_bias(users[0].outputs[0])
        if source is product:
            return users[0].outputs[0], bias
    return product, None


def _before_bias(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """``value`` = x + bias[owner of the row]: x and the biases [E, .]; else ``value`` itself and None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Add":
        return value, None
    for bias_rows, source in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        gather = bias_rows.producer() if bias_rows is not None else None
        if gather is None or gather.op_type != "Gather" or gather.inputs[0] is None:
            continue
        bias = gather.inputs[0]
        axis = gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0
        stored = bias.const_value is not None and len(bias.const_value.shape) == 2
        if axis == 0 and stored and _owner(gather.inputs[1]):
            return source, bias
    return value, None


def _owner(value: ir.Value | None) -> bool:
    """Whether ``value`` is each sorted row's expert: the ids, flattened, in Dispatch's order."""
    for _ in range(8):
        node = value.producer() if value is not None else None
        if node is None:
            return False
        if node.op_type in ("Gather", "GatherND"):
            order = node.inputs[1]
            source = order.producer() if order is not None else None
            if node.op_type == "GatherND" and source is not None and source.op_type == "Unsqueeze":
                order = source.inputs[0]
                source = order.producer() if order is not None else None
            ours = source is not None and source.domain == DOMAIN and source.op_type == "Dispatch"
            return ours and source is not None and order is source.outputs[0]
        if node.op_type not in ("Clip", "Cast", "Max", "Min", "Identity"):
            return False
        value = node.inputs[0]
    return False


def replace_output(graph: ir.Graph, nodes: ExpertNodes, made: list[ir.Node]) -> None:
    """Insert ``made`` before the layer's Combine; the last one's result takes the place and name of its
    output."""
    old, new = nodes.output, made[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(nodes.combine, made)
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name
