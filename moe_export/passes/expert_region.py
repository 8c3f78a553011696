"""Which nodes of a graph compute a layer's experts, from its tokens and ids to the rows that are combined."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..graph.moe_values import ExpertNodes
from ..graph.subgraph import ancestors

if TYPE_CHECKING:
    import onnx_ir as ir


def find_region(nodes: ExpertNodes) -> tuple[list[ir.Node], list[str]]:
    """What leads from tokens and ids to the rows that are combined, and what else of the graph it reads."""
    stops = {id(nodes.hidden), id(nodes.expert_ids), id(nodes.weights)}
    found: dict[int, ir.Node] = {}
    waiting = [nodes.combine.inputs[0], nodes.dispatch.outputs[0]]
    foreign: list[str] = []
    readers = _descendants((nodes.expert_ids, nodes.gather.outputs[0]))
    while waiting:
        value = waiting.pop()
        if value is None or id(value) in stops or value.const_value is not None:
            continue
        node = value.producer()
        if node is None or id(node) not in readers:
            if not _constant(value):
                foreign.append(value.name or "a value")
            continue
        if id(node) not in found:
            found[id(node)] = node
            waiting.extend(node.inputs)
    if id(nodes.gather) not in found:
        found[id(nodes.gather)] = nodes.gather
    return [*found.values()], foreign


def _constant(value: ir.Value) -> bool:
    """Whether a value does not depend on the model's inputs."""
    held = [value, *(v for node in ancestors([value])[0] for v in node.inputs if v is not None)]
    return all(v.producer() is not None or v.const_value is not None for v in held)


def forget_rows(value: ir.Value) -> None:
    """A rank has other rows, and other experts, than the whole model."""
    import onnx_ir as ir

    if value.shape is not None and len(value.shape):
        value.shape = ir.Shape([None, *value.shape[1:]])


def _descendants(values: Iterable[ir.Value]) -> set[int]:
    """Nodes that read ``values``, or something computed from them."""
    found: set[int] = set()
    waiting = list(values)
    while waiting:
        for node, _ in waiting.pop().uses():
            if id(node) not in found:
                found.add(id(node))
                waiting.extend(node.outputs)
    return found
