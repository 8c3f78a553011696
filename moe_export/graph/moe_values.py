"""Find the MoE layers of a traced graph and give their values the names the rest of moe-export reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ExportError
from ..ops import DOMAIN
from ..schema import MoELayer
from .names import RESERVED, free_reserved_names, move_aside, named_values, nth_call

if TYPE_CHECKING:
    import onnx_ir as ir


def name_value(model: ir.Model, value: ir.Value, name: str, reader: ir.Node | None = None) -> ir.Value:
    """Name ``value``; through an Identity where it already carries a name that others rely on.

    ``reader``: the node that shall read the named value where two layers share ``value``; None: every reader.

    Returns the value that has the name.
    """
    import onnx_ir as ir

    if value.name == name:
        return value
    taken = value.name is not None and RESERVED.match(value.name) is not None
    if not (taken or value.is_graph_input() or value.is_graph_output() or value.is_initializer()):
        value.name = name
        return value
    node = ir.node("Identity", [value])
    out = node.outputs[0]
    out.type, out.shape, out.name = value.type, value.shape, name
    producer = value.producer()
    if value.is_graph_output():
        # The inside keeps the moe name; the outputs are copies.
        if producer is None:
            raise ExportError(f"graph output {value.name!r} is produced by nothing")
        model.graph.insert_after(producer, node)
        old = value.name
        index = list(model.graph.outputs).index(value)
        value.name, out.name = name, old
        model.graph.outputs[index] = out
        return value
    if producer is None:
        first = next(iter(model.graph), None)
        if first is None:
            raise ExportError(f"{name}: the graph has no node")
        model.graph.insert_before(first, node)
    else:
        model.graph.insert_after(producer, node)
    for user, index in list(value.uses()):
        if user is not node and (user is reader or reader is None or not taken):
            user.replace_input_with(index, out)
    return out


def _consumer(value: ir.Value, op_type: str, domain: str) -> ir.Node | None:
    for node, _ in value.uses():
        if node.op_type == op_type and node.domain in (domain, "ai.onnx" if domain == "" else domain):
            return node
    return None


@dataclass(frozen=True)
class ExpertNodes:
    """The nodes and values of one MoE layer."""

    dispatch: ir.Node
    gather: ir.Node
    combine: ir.Node
    first: ir.Node
    """The GroupedMatMul that reads the tokens."""
    last: ir.Node
    """The GroupedMatMul whose rows are combined."""
    hidden: ir.Value
    expert_ids: ir.Value
    weights: ir.Value
    output: ir.Value


def expert_nodes(dispatch: ir.Node) -> ExpertNodes:
    """Follow a Dispatch to the other nodes of its layer.

    Raises:
        ExportError: the layer does not have the shape the hook gives it.
    """
    name = dispatch.attributes["layer"].as_string() if "layer" in dispatch.attributes else ""
    combine = _consumer(dispatch.outputs[0], "Combine", DOMAIN)
    gather = _consumer(dispatch.outputs[2], "Gather", "")
    if combine is None or gather is None:
        raise ExportError(f"MoE layer {name!r}: the graph lacks its token gather or its Combine")
    ours = [n for n, _ in dispatch.outputs[1].uses() if n.domain == DOMAIN and n.op_type == "GroupedMatMul"]
    first = _consumer(gather.outputs[0], "GroupedMatMul", DOMAIN)
    last = _before(combine.inputs[0], ours)
    found = (gather.inputs[0], dispatch.inputs[0], combine.inputs[2])
    if first is None or last is None or None in found:
        raise ExportError(f"MoE layer {name!r}: no GroupedMatMul between dispatch and combine")
    hidden, ids, weights = (v for v in found if v is not None)
    return ExpertNodes(dispatch, gather, combine, first, last, hidden, ids, weights, combine.outputs[0])


def _values(found: ExpertNodes, layer: MoELayer) -> dict[str, tuple[ir.Value, ir.Node | None]]:
    """Name → the value that shall have it, and the node of this layer that reads it."""
    return {
        layer.hidden: (found.hidden, found.gather),
        layer.expert_ids: (found.expert_ids, found.dispatch),
        layer.weights: (found.weights, found.combine),
        layer.output: (found.output, None),
    }


def _before(value: ir.Value | None, nodes: Sequence[ir.Node]) -> ir.Node | None:
    """The nearest of ``nodes`` that ``value`` is computed from."""
    wanted = {id(n) for n in nodes}
    seen: set[int] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        node = None if current is None else current.producer()
        if node is None or id(node) in seen:
            continue
        if id(node) in wanted:
            return node
        seen.add(id(node))
        stack.extend(reversed(node.inputs))
    return None


def _weight_shape(node: ir.Node, name: str) -> list[int]:
    weight = node.inputs[1]
    shape = None if weight is None else weight.shape
    if shape is None or not all(isinstance(d, int) for d in shape):
        raise ExportError(f"MoE layer {name!r}: the shape of its expert weights is not known")
    return [int(d) for d in shape]  # type: ignore[arg-type]


def _top_k(layer: ExpertNodes, name: str) -> int:
    for value in (layer.expert_ids, layer.weights):
        if value.shape is not None and len(value.shape) == 2 and isinstance(value.shape[1], int):
            return int(value.shape[1])
    raise ExportError(f"MoE layer {name!r}: how many experts each token has is not known from its expert ids")


def name_moe_values(model: ir.Model) -> tuple[MoELayer, ...]:
    """Name hidden, expert ids, weights and output of each Dispatch in graph order; number repeated layer
    names.

    Raises:
        ExportError: an MoE layer does not have the shape the hook gives it, or an input or output has one of
        the names.
    """
    import onnx_ir as ir

    free_reserved_names(model)
    layers = []
    calls: Counter[str] = Counter()
    dispatches = [n for n in model.graph if n.domain == DOMAIN and n.op_type == "Dispatch"]
    for index, dispatch in enumerate(dispatches):
        name = dispatch.attributes["layer"].as_string() if "layer" in dispatch.attributes else ""
        calls[name] += 1
        name = nth_call(name, calls[name])
        dispatch.attributes["layer"] = ir.AttrString("layer", name)
        found = expert_nodes(dispatch)
        transposed = found.first.attributes["transposed"].as_int()
        prefix = f"moe.{index}"
        layers.append(
            MoELayer(
                index=index,
                name=name,
                num_experts=dispatch.attributes["num_experts"].as_int(),
                top_k=_top_k(found, name),
                hidden_size=_weight_shape(found.first, name)[1 if transposed else 2],
                intermediate_size=_weight_shape(found.last, name)[1 if transposed else 2],
                hidden=f"{prefix}.hidden",
                expert_ids=f"{prefix}.expert_ids",
                weights=f"{prefix}.weights",
                output=f"{prefix}.output",
            )
        )
        for name, (value, reader) in _values(found, layers[-1]).items():
            name_value(model, value, name, reader)
    return tuple(layers)


def find_value(model: ir.Model, name: str) -> ir.Value | None:
    """The value called ``name`` in the main graph."""
    return next((v for n, v in named_values(model) if n == name), None)


def rename_moe_values(model: ir.Model, layers: Sequence[MoELayer]) -> None:
    """Give the values of each MoE layer their names again after a rewrite that replaced their producers.

    Raises:
        ExportError: a layer's Dispatch or Combine is gone.
    """
    dispatches = {
        n.attributes["layer"].as_string(): n
        for n in model.graph
        if n.domain == DOMAIN and n.op_type == "Dispatch"
    }
    for layer in layers:
        if layer.name not in dispatches:
            raise ExportError(f"MoE layer {layer.name!r}: a rewrite removed its Dispatch")
        found = expert_nodes(dispatches[layer.name])
        values = _values(found, layer)
        router = _through_identity(found.expert_ids).producer()
        if layer.logits is not None and router is not None and router.op_type == "Router":
            assert router.inputs[0] is not None
            values[layer.logits] = router.inputs[0], router
        for name, (value, reader) in values.items():
            if not _carries(value, name):
                move_aside(model, name)
                name_value(model, value, name, reader)


def _through_identity(value: ir.Value) -> ir.Value:
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _carries(value: ir.Value, name: str) -> bool:
    """Whether ``value`` or what it is a copy of has the name (a value shared by two layers has two names)."""
    node = value.producer()
    while value.name != name and node is not None and node.op_type == "Identity":
        assert node.inputs[0] is not None
        value = node.inputs[0]
        node = value.producer()
    return value.name == name
