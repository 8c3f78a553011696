"""Cut a piece out of a graph and make it a model of its own, so that it can be run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def ancestors(
    values: Sequence[ir.Value], stop: Collection[ir.Value] = ()
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that ``values`` depend on up to ``stop``, and the values of ``stop`` that were reached.

    Values used inside subgraphs (If, Loop) count as inputs of their node.
    """
    nodes: dict[int, ir.Node] = {}
    reached: dict[int, ir.Value] = {}
    stopped = {id(v) for v in stop}
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) in stopped:
            reached[id(value)] = value
            continue
        node = value.producer()
        if node is None or id(node) in nodes:
            continue
        nodes[id(node)] = node
        stack.extend(v for v in node.inputs if v is not None)
    return list(nodes.values()), list(reached.values())


def extract(
    model: ir.Model,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    as_inputs: Sequence[ir.Value] = (),
) -> onnx.ModelProto | None:
    """A model that computes ``outputs`` from ``inputs`` and ``as_inputs`` (initializers turned into inputs).

    None if the piece depends on anything else that is not an initializer.
    """
    import onnx
    import onnx_ir as ir

    cut = [*inputs, *as_inputs]
    nodes, _ = ancestors(outputs, cut)
    inside = {id(n) for n in nodes}
    ordered = [n for n in model.graph if id(n) in inside]
    if len(ordered) != len(nodes):
        return None
    cut_ids = {id(v) for v in cut}
    initializers: dict[str, ir.Value] = {}
    for node in ordered:
        if node.attributes and any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
        ):
            return None
        for value in node.inputs:
            if value is None or id(value) in cut_ids:
                continue
            producer = value.producer()
            if producer is None:
                if not value.is_initializer() or value.name is None:
                    return None
                initializers[value.name] = value
    graph = onnx.GraphProto(name="piece")
    graph.node.extend(ir.to_proto(n) for n in ordered)
    for value in cut:
        assert value.name is not None and value.dtype is not None
        graph.input.append(onnx.helper.make_tensor_value_info(value.name, value.dtype.value, None))
    for value in outputs:
        assert value.name is not None and value.dtype is not None
        graph.output.append(onnx.helper.make_tensor_value_info(value.name, value.dtype.value, None))
    for value in initializers.values():
        assert value.const_value is not None
        graph.initializer.append(ir.to_proto(ir.Tensor(value.const_value.numpy(), name=value.name)))
    piece = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in model.graph.opset_imports.items()],
        ir_version=10,
    )
    piece.functions.extend(ir.to_proto(f) for f in model.functions.values())
    return piece


def session_of(piece: onnx.ModelProto, threads: int | None = 1, plugin: object = None) -> Any:
    """An ONNX Runtime session over a piece, which logs nothing.

    ``threads`` None: all cores. ``plugin``: library whose kernels run our ops; None: their bodies run.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads:
        options.intra_op_num_threads = threads
    if plugin:
        options.register_custom_ops_library(str(plugin))
    return ort.InferenceSession(piece.SerializeToString(), options, providers=["CPUExecutionProvider"])
