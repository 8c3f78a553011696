"""bfloat16 for GPUs: weights and products in bfloat16, all that runs between products in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..ops import DOMAIN
from ..schema import Decision
from .base import Pass, PassContext
from .bfloat16_weights import SMALLEST

if TYPE_CHECKING:
    import onnx_ir as ir

_MOVES = frozenset(
    (
        "Gather",
        "Transpose",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Split",
        "Expand",
        "Flatten",
        "Identity",
    )
)
"""Ops that move numbers and compute none; they move their first input."""
_PRODUCTS = ("MatMul", "Gemm")
_PLUGIN_WEIGHTS = (3, 4)
"""ExpertMLP's inputs ``up`` and ``down``. The GPU plugin takes them in the dtype of its tokens."""
_BETWEEN_PRODUCT_AND_SOFTMAX = frozenset(
    ("Mul", "Div", "Add", "Sub", "Where", "Reshape", "Cast", "Transpose", "Clip", "Tanh", "Concat", "Slice")
)
_FAR = 8
"""Nodes between an attention's products and its softmax, at most."""


class BFloat16Products(Pass):
    """``MatMul(x, w)`` in float32 becomes ``Cast(MatMul(Cast(x), w))`` with ``w`` stored in bfloat16, as
    autocast
    does; so do both products of attention. Router logits stay a float32 product of rounded weights: routing
    flips
    with less. Norms, softmax, rotary angles and sums stay float32.
    """

    name = "bfloat16-products"

    def _run(self, context: PassContext) -> None:
        if context.dtype != "bfloat16":
            return
        import onnx_ir as ir
        import onnx_ir.passes.common as common

        graph = context.model.graph
        self._logits = {layer.logits for layer in context.layers}
        self._casts: dict[tuple[int, int], ir.Value] = {}
        self._products = self._named = stored = 0
        plugins = [n for n in _all_nodes(graph) if n.domain == DOMAIN and n.op_type == "ExpertMLP"]
        matrices = {id(n.inputs[i]) for n in plugins for i in _PLUGIN_WEIGHTS}
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or not _uses(value):
                continue
            kept = tensor.size < SMALLEST or value.name in context.float32_weights
            if kept and id(value) not in matrices:
                continue
            self._spread(value, _rounded(graph, value))
            stored += 1
            name = value.name
            assert name is not None
            del graph.initializers[name]
        for node in list(_all_nodes(graph)):
            if node.op_type == "MatMul" and node.domain == "" and _in_attention(node):
                self._product(node, {})
        for node in plugins:
            hidden = node.inputs[0]
            assert hidden is not None
            node.replace_input_with(0, self._cast(hidden, ir.DataType.BFLOAT16, node))
            self._back_to_float32(node, None)
        common.RemoveUnusedNodesPass()(context.model)
        graph.sort()
        context.decisions.append(
            Decision(
                "weights and products",
                f"{stored} weights stored in bfloat16, {self._products} products in bfloat16",
                "matrix units take bfloat16; norms, softmax, routing, residual sums and the KV cache stay "
                "float32, "
                f"and so do tensors of fewer than {SMALLEST} elements",
            )
        )

    def _spread(self, value: ir.Value, rounded: ir.Value) -> None:
        """``rounded`` takes the place of ``value`` (float32) wherever that is read."""
        import onnx_ir as ir

        for node, index in _uses(value):
            if node.domain == "" and node.op_type in _MOVES and index == 0:
                moved = ir.node(
                    node.op_type,
                    [rounded, *node.inputs[1:]],
                    attributes=dict(node.attributes),
                    num_outputs=len(node.outputs),
                )
                for old, new in zip(node.outputs, moved.outputs, strict=True):
                    new.shape, new.dtype = old.shape, ir.DataType.BFLOAT16
                    new.name = self._name(old)
                _graph_of(node).insert_before(node, moved)
                for old, new in zip(node.outputs, moved.outputs, strict=True):
                    self._spread(old, new)
            elif node.domain == "" and node.op_type in _PRODUCTS and index < 2 and self._may_round(node):
                self._product(node, {index: rounded})
            elif node.domain == DOMAIN and node.op_type == "ExpertMLP" and index in _PLUGIN_WEIGHTS:
                node.replace_input_with(index, rounded)
            else:
                node.replace_input_with(index, self._cast(rounded, ir.DataType.FLOAT, node))

    def _name(self, value: ir.Value) -> str:
        """A name that no other value has; names made up by a graph repeat those of the graphs around it."""
        self._named += 1
        return f"{value.name}.cast.{self._named}"

    def _may_round(self, node: ir.Node) -> bool:
        return node.outputs[0].name not in self._logits

    def _product(self, node: ir.Node, rounded: dict[int, ir.Value]) -> None:
        """Let ``node`` multiply in bfloat16; its result is float32 as before. A Gemm's third input is added
        in
        float32."""
        import onnx_ir as ir

        result = node.outputs[0]
        if result.dtype not in (None, ir.DataType.FLOAT):
            return
        for index in (0, 1):
            value = node.inputs[index]
            assert value is not None
            if value.dtype == ir.DataType.BFLOAT16:
                continue
            node.replace_input_with(
                index, rounded.get(index) or self._cast(value, ir.DataType.BFLOAT16, node)
            )
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            node.resize_inputs(2)
        self._back_to_float32(node, bias)
        self._products += 1

    def _back_to_float32(self, node: ir.Node, bias: ir.Value | None) -> None:
        """Cast the result of ``node`` to float32 and add ``bias``, under the name that the result had."""
        import onnx_ir as ir

        result = node.outputs[0]
        graph, name, shape = _graph_of(node), result.name, result.shape
        cast = ir.node("Cast", [result], attributes={"to": ir.DataType.FLOAT.value})
        nodes, last = [cast], cast.outputs[0]
        last.dtype, last.shape = ir.DataType.FLOAT, shape
        if bias is not None:
            nodes.append(ir.node("Add", [last, bias]))
            last = nodes[-1].outputs[0]
            last.dtype, last.shape = ir.DataType.FLOAT, shape
        users = [use for use in _uses(result) if use[0] is not cast]
        for user, index in users:
            user.replace_input_with(index, last)
        for index, output in enumerate(graph.outputs):
            if output is result:
                graph.outputs[index] = last
        result.type, result.name = ir.TensorType(ir.DataType.BFLOAT16), self._name(result)
        if bias is not None:
            cast.outputs[0].name = self._name(result)
        last.name = name
        graph.insert_after(node, nodes)

    def _cast(self, value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        """``value`` in another dtype; one Cast per value and graph that reads it."""
        import onnx_ir as ir

        graph = _graph_of(before)
        key = id(value), id(graph)
        if key in self._casts:
            return self._casts[key]
        cast = ir.node("Cast", [value], attributes={"to": to.value})
        cast.outputs[0].dtype, cast.outputs[0].shape = to, value.shape
        cast.outputs[0].name = self._name(value)
        producer = value.producer()
        if producer is not None and producer.graph is graph:
            graph.insert_after(producer, cast)
        else:
            graph.insert_before(next(iter(graph)), cast)
        self._casts[key] = cast.outputs[0]
        return cast.outputs[0]


def _rounded(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A new initializer: ``value``'s numbers in bfloat16."""
    import ml_dtypes
    import onnx_ir as ir

    assert value.const_value is not None
    name = f"{value.name}.bfloat16"
    array = value.const_value.numpy().astype(ml_dtypes.bfloat16)
    stored = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    stored.dtype, stored.shape = ir.DataType.BFLOAT16, value.shape
    graph.register_initializer(stored)
    return stored


def _uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in value.uses()]


def _graph_of(node: ir.Node) -> ir.Graph:
    import onnx_ir as ir

    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    yield from graph.all_nodes()


def _in_attention(node: ir.Node) -> bool:
    """A product of two computed values whose result a softmax reads, or one of whose factors it made."""
    if any(v is None or v.const_value is not None for v in node.inputs):
        return False
    after = [node]
    for _ in range(_FAR):
        after = [u for n in after for out in n.outputs for u, _i in _uses(out)]
        if any(n.op_type == "Softmax" for n in after):
            return True
        after = [n for n in after if n.op_type in _BETWEEN_PRODUCT_AND_SOFTMAX]
    before = [node]
    for _ in range(_FAR):
        made = (v.producer() for n in before for v in n.inputs if v is not None)
        before = [n for n in made if n is not None]
        if any(n.op_type == "Softmax" for n in before):
            return True
        before = [n for n in before if n.op_type in _BETWEEN_PRODUCT_AND_SOFTMAX]
    return False
