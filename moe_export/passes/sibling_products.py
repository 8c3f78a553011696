"""Products of one value with several constant matrices (query, key and value; gate and up) as one product."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


def pack_sibling_products(model: ir.Model) -> int:
    """Make one MatMul and a Split of the MatMuls that read one value; how many such groups there were.

    transformers' own step reads and joins the matrices at once; here they are joined when they are written,
    so that no copy of a model's dense weights is held.
    """
    import onnx_ir as ir

    groups: dict[tuple[Any, ...], list[_Product]] = {}
    for node in model.graph.all_nodes():
        if node.op_type != "MatMul" or node.domain != "" or not isinstance(node.graph, ir.Graph):
            continue
        value, matrix = node.inputs
        held = matrix.const_value if matrix is not None else None
        if value is not None and held is not None and len(held.shape) == 2:
            groups.setdefault((id(value), id(node.graph)), []).append(_Product(node, node.graph, value, held))
    packed = 0
    for siblings in groups.values():
        if len(siblings) > 1 and len({(s.matrix.shape.numpy()[0], s.matrix.dtype) for s in siblings}) == 1:
            _pack(model, siblings)
            packed += 1
    return packed


@dataclass(frozen=True)
class _Product:
    node: ir.Node
    graph: ir.Graph
    value: ir.Value
    matrix: ir.TensorProtocol


def _pack(model: ir.Model, siblings: list[_Product]) -> None:
    import numpy as np
    import onnx_ir as ir

    first = siblings[0]  # nodes are in order: what the others read is there by then
    tensors = [s.matrix for s in siblings]
    widths = [t.shape.numpy()[1] for t in tensors]
    dtype, name = tensors[0].dtype, f"packed.{first.node.outputs[0].name}"
    joined = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([t.numpy() for t in tensors], axis=1), dtype=dtype),
        dtype=dtype,
        shape=ir.Shape((tensors[0].shape.numpy()[0], sum(widths))),
        name=name,
    )
    matrix = _initializer(model.graph, joined)
    sizes = _initializer(model.graph, ir.tensor(np.array(widths, np.int64), name=f"{name}.sizes"))
    product = ir.node("MatMul", [first.value, matrix])
    out = product.outputs[0]
    split = ir.node("Split", [out, sizes], attributes={"axis": -1}, num_outputs=len(siblings))
    out.type = copy.copy(first.node.outputs[0].type)
    if first.value.shape is not None:
        out.shape = ir.Shape([*first.value.shape[:-1], sum(widths)])
    first.graph.insert_before(first.node, [product, split])
    for sibling, part in zip(siblings, split.outputs, strict=True):
        old = sibling.node.outputs[0]
        part.type, part.shape = old.type, old.shape
        held = old.name
        old.replace_all_uses_with(part, replace_graph_outputs=True)
        sibling.graph.remove(sibling.node, safe=True)
        part.name = held


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    import onnx_ir as ir

    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
    graph.register_initializer(value)
    return value
