"""Each MoE layer's experts as one ExpertMLP node, where its activation is proven to be one the op has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..graph.functions import attach_functions
from ..graph.moe_values import ExpertNodes, expert_nodes
from ..ops import DOMAIN, OPS
from ..ops.packing import pack_down, pack_up
from ..schema import Alternative, Decision
from .activation_proof import find_activation
from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir


class FuseExperts(Pass):
    """``option fused_experts``: whether the CPU plugin is there to run the op. Without it the op's body runs
    a Loop, which is slower than what :class:`UnrollExperts` makes."""

    name = "fuse-experts"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        if not context.options.get("fused_experts", False):
            return
        chosen: tuple[Any, ...] | None = None
        packer = _Packer(context.model.graph) if context.options.get("expert_weights") != "as-is" else None
        for layer in context.layers:
            found = _find(context, layer.name)
            if isinstance(found, str):
                context.decisions.append(Decision(f"{layer.name}: experts", "apart", found))
                continue
            variant = OPS["ExpertMLP"].variant(found.attributes)
            if chosen is not None and variant != chosen:
                reason = "differs in form from the model's other experts; one body cannot serve both"
                context.decisions.append(Decision(f"{layer.name}: experts", "apart", reason))
                continue
            chosen = variant
            activation, before = found.attributes["activation"], _bytes(found.weights)
            weights = "as they were"
            if packer is not None:
                found = packer.pack(found)
                weights = _packed_text(before, _bytes(found.weights))
            _replace(context.model.graph, found)
            context.fused = (*context.fused, layer.index)
            context.decisions.append(
                Decision(
                    f"{layer.name}: experts",
                    "one ExpertMLP op of the CPU plugin",
                    f"its activation is {activation}, proven by running its nodes; weights {weights}",
                    (Alternative("unrolled", "one MatMul per expert: writes and reads each expert's rows"),),
                )
            )
        if chosen is not None:
            common.RemoveUnusedNodesPass()(context.model)
            attach_functions(context.model, context.opset)


@dataclass(frozen=True)
class _Fusion:
    """An ExpertMLP node's inputs and attributes, and the value it replaces."""

    nodes: ExpertNodes
    weights: tuple[ir.Value, ir.Value]
    """Up and down; each a constant."""
    biases: tuple[ir.Value | None, ir.Value | None]
    attributes: dict[str, Any]


def _find(context: PassContext, name: str) -> _Fusion | str:
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
    width = up.const_value.numpy().shape[2 if transposed else 1]
    intermediate = down.const_value.numpy().shape[1 if transposed else 2]
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
    return _Fusion(nodes, (up, down), (up_bias, down_bias), OPS["ExpertMLP"].complete(attributes))


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
        if node.op_type == "Gather":
            order = node.inputs[1]
            source = order.producer() if order is not None else None
            return source is not None and source.domain == DOMAIN and source.op_type == "Dispatch"
        if node.op_type not in ("Clip", "Cast", "Max", "Min", "Identity"):
            return False
        value = node.inputs[0]
    return False


def _replace(graph: ir.Graph, found: _Fusion) -> None:
    import onnx_ir as ir

    nodes = found.nodes
    node = ir.node(
        "ExpertMLP",
        [nodes.hidden, nodes.expert_ids, nodes.weights, *found.weights, *found.biases],
        attributes=found.attributes,
        domain=DOMAIN,
    )
    old, new = nodes.output, node.outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(nodes.combine, [node])
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name


def _bytes(weights: Sequence[ir.Value]) -> int:
    return sum(v.const_value.nbytes for v in weights if v.const_value is not None)


def _packed_text(before: int, after: int) -> str:
    """What packing costs on disk."""
    grown = f"{100 * (after - before) / before:.1f} % larger" if after > before else "no larger"
    return f"packed in panels of 64 columns, {after / 2**20:.1f} MiB, {grown}; packed once, here"


class _Packer:
    """Packs expert weights of one graph; a weight that two layers share is packed once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[int, ir.Value] = {}

    def pack(self, found: _Fusion) -> _Fusion:
        """``found`` with packed weights, and with its up bias in the order of packed columns."""
        import numpy as np

        given = found.attributes
        form = {"gated": bool(given["gated"]), "layout": given["layout"]}
        transposed = bool(given["transposed"])
        up, down = found.weights
        bias = found.biases[0]
        packed = (
            self._stored(up, lambda array: pack_up(array, **form, transposed=transposed)),
            self._stored(down, lambda array: pack_down(array, transposed=transposed)),
        )
        if bias is not None and given["gated"] and given["layout"] == "interleaved":
            bias = self._stored(bias, lambda a: np.concatenate([a[:, 0::2], a[:, 1::2]], axis=1))
        attributes = {**given, "packed": 1, "transposed": 0, "layout": "concatenated"}
        return dataclasses.replace(
            found,
            weights=packed,
            biases=(bias, found.biases[1]),
            attributes=OPS["ExpertMLP"].complete(attributes),
        )

    def _stored(self, value: ir.Value, change: Callable[[Any], Any]) -> ir.Value:
        import onnx_ir as ir

        if id(value) not in self._made:
            assert value.const_value is not None
            name = f"{value.name}.packed"
            array = change(value.const_value.numpy())
            tensor = ir.tensor(array, name=name)
            held = ir.Value(name=name, const_value=tensor, type=value.type, shape=ir.Shape(array.shape))
            self._graph.register_initializer(held)
            self._made[id(value)] = held
        return self._made[id(value)]
