"""Find the MoE layers of a traced graph and give their values the names the rest of moe-export reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ExportError
from ..ops import DOMAIN
from ..schema import MoELayer

if TYPE_CHECKING:
    import onnx_ir as ir


def _rename(model: ir.Model, value: ir.Value, name: str) -> ir.Value:
    """Name ``value``; through an Identity where it already carries a name others rely on."""
    import onnx_ir as ir

    taken = value.name is not None and value.name.startswith("moe.")
    if not (taken or value.is_graph_input() or value.is_graph_output() or value.is_initializer()):
        value.name = name
        return value
    node = ir.node("Identity", [value])
    out = node.outputs[0]
    out.type, out.shape, out.name = value.type, value.shape, name
    if value.is_graph_output():
        # The inside keeps the moe name; the output is the copy.
        inner = value.producer()
        if inner is None:
            raise ExportError(f"graph output {value.name!r} is produced by nothing")
        model.graph.insert_after(inner, node)
        old = value.name
        index = list(model.graph.outputs).index(value)
        value.name, out.name = name, old
        model.graph.outputs[index] = out
        return value
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(next(iter(model.graph)), node)
    else:
        model.graph.insert_after(producer, node)
    value.replace_all_uses_with(out)
    node.replace_input_with(0, value)
    return out


def _consumer(value: ir.Value, op_type: str, domain: str) -> ir.Node | None:
    for node, _ in value.uses():
        if node.op_type == op_type and node.domain in (domain, "ai.onnx" if domain == "" else domain):
            return node
    return None


def _last_grouped_matmul(value: ir.Value) -> ir.Node | None:
    """The GroupedMatMul that ``value`` comes from through nodes of one path of data."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        node = stack.pop().producer()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.domain == DOMAIN and node.op_type == "GroupedMatMul":
            return node
        stack.extend(v for v in node.inputs if v is not None)
    return None


def name_moe_values(model: ir.Model) -> tuple[MoELayer, ...]:
    """Name hidden, expert ids, weights and output of each Dispatch in graph order.

    Raises:
        ExportError: an MoE layer does not have the shape the hook gives it.
    """
    layers = []
    dispatches = [n for n in model.graph if n.domain == DOMAIN and n.op_type == "Dispatch"]
    for index, dispatch in enumerate(dispatches):
        name = dispatch.attributes["layer"].as_string() if "layer" in dispatch.attributes else ""
        experts = dispatch.attributes["num_experts"].as_int()
        ids, tokens = dispatch.inputs[0], dispatch.outputs[2]
        combine = _consumer(dispatch.outputs[0], "Combine", DOMAIN)
        gather = _consumer(tokens, "Gather", "")
        if ids is None or combine is None or gather is None:
            raise ExportError(f"MoE layer {name!r}: the traced graph lacks its token gather or its Combine")
        first = _consumer(gather.outputs[0], "GroupedMatMul", DOMAIN)
        rows, weights, hidden = combine.inputs[0], combine.inputs[2], gather.inputs[0]
        assert rows is not None and weights is not None and hidden is not None
        last = _last_grouped_matmul(rows)
        if first is None or last is None:
            raise ExportError(f"MoE layer {name!r}: no GroupedMatMul between dispatch and combine")
        shapes = [[int(d) for d in node.inputs[1].shape] for node in (first, last)]  # type: ignore[union-attr]
        transposed = first.attributes["transposed"].as_int()
        hidden_size = shapes[0][1 if transposed else 2]
        intermediate = shapes[1][1 if transposed else 2]
        top_k = int(ids.shape[1]) if ids.shape is not None and isinstance(ids.shape[1], int) else 0
        if not top_k and weights.shape is not None and isinstance(weights.shape[1], int):
            top_k = int(weights.shape[1])
        prefix = f"moe.{index}"
        layers.append(
            MoELayer(
                index=index,
                name=name,
                num_experts=experts,
                top_k=top_k,
                hidden_size=hidden_size,
                intermediate_size=intermediate,
                hidden=str(_rename(model, hidden, f"{prefix}.hidden").name),
                expert_ids=str(_rename(model, ids, f"{prefix}.expert_ids").name),
                weights=str(_rename(model, weights, f"{prefix}.weights").name),
                output=str(_rename(model, combine.outputs[0], f"{prefix}.output").name),
            )
        )
    return tuple(layers)


def find_value(model: ir.Model, name: str) -> ir.Value | None:
    """The value called ``name`` in the main graph."""
    for value in model.graph.inputs:
        if value.name == name:
            return value
    for node in model.graph:
        for value in node.outputs:
            if value.name == name:
                return value
    return model.graph.initializers.get(name)


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
        dispatch = dispatches.get(layer.name)
        combine = _consumer(dispatch.outputs[0], "Combine", DOMAIN) if dispatch is not None else None
        gather = _consumer(dispatch.outputs[2], "Gather", "") if dispatch is not None else None
        if dispatch is None or combine is None or gather is None:
            raise ExportError(
                f"MoE layer {layer.name!r}: a rewrite removed its Dispatch, token gather or Combine"
            )
        found = {
            layer.hidden: gather.inputs[0],
            layer.expert_ids: dispatch.inputs[0],
            layer.weights: combine.inputs[2],
            layer.output: combine.outputs[0],
        }
        router = dispatch.inputs[0].producer() if dispatch.inputs[0] is not None else None
        if layer.logits is not None and router is not None and router.op_type == "Router":
            found[layer.logits] = router.inputs[0]
        for name, value in found.items():
            if value is None:
                raise ExportError(f"MoE layer {layer.name!r}: {name} has no value after a rewrite")
            if value.name == name:
                continue
            other = find_value(model, name)
            if other is not None:
                other.name = f"{name}.before"
            _rename(model, value, name)
