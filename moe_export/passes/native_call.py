"""Put an ONNX function's nodes in the place of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .native_text import NATIVE_DOMAIN

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def put_function(
    model: ir.Model,
    function: onnx.FunctionProto,
    inputs: Sequence[ir.Value | None],
    replaced: Sequence[ir.Value],
    before: ir.Node,
    *,
    load: str | None = None,
) -> ir.Value | None:
    """Insert the nodes of ``function``, called with ``inputs``, before a node of the main graph.

    Its outputs take place, name, type and shape of ``replaced``. ``load``: the function has one output more,
    int32 [1], which gets this name and is returned. New nodes are named after the function.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    call: Any = ir.node(
        function.name,
        inputs,
        domain=NATIVE_DOMAIN,
        num_outputs=len(replaced) + (load is not None),
    )
    model.graph.insert_before(before, call)
    for old, new in zip(replaced, call.outputs, strict=False):
        new.type, new.shape = old.type, old.shape
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, name
    if load is not None:
        call.outputs[-1].name = load
        call.outputs[-1].type = ir.TensorType(ir.DataType.INT32)
        call.outputs[-1].shape = ir.Shape([1])
    held = ir.from_proto(function)
    model.functions[held.identifier()] = held
    model.graph.opset_imports[NATIVE_DOMAIN] = 1
    known = {id(node) for node in model.graph.all_nodes()}
    common.InlinePass(lambda f: f.identifier() == held.identifier())(model)
    del model.graph.opset_imports[NATIVE_DOMAIN]
    new_nodes = (node for node in model.graph.all_nodes() if id(node) not in known)
    for number, node in enumerate(new_nodes):
        node.name = f"{function.name}/{number}.{node.op_type}"
    if load is None:
        return None
    return next(value for node in model.graph for value in node.outputs if value.name == load)


def drop_unused(model: ir.Model, node: ir.Node) -> None:
    """Remove ``node`` if nothing reads it, and then what only it read."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        used = any(value.uses() or value.is_graph_output() for value in current.outputs)
        if used or current.graph is not model.graph:
            continue
        waiting += [
            p for value in current.inputs if value is not None and (p := value.producer()) is not None
        ]
        model.graph.remove(current, safe=True)
