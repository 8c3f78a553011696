"""Drop pairs of Reshapes that split the last axis into heads and merge it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir


class MergeReshapes(Pass):
    """``[a, b, n] -> [a, b, heads, n/heads] -> [a, b, n]`` is its input."""

    name = "merge-reshapes"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        for node in list(context.model.graph):
            if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
                continue
            source = _split_and_merged(node)
            if source is not None:
                node.outputs[0].replace_all_uses_with(source)
        common.RemoveUnusedNodesPass()(context.model)


def _split_and_merged(node: ir.Node) -> ir.Value | None:
    """What ``node`` gives back: the value before the split, if node merges what the one before it split."""
    middle, shape = node.inputs
    if middle is None or shape is None or shape.const_value is None:
        return None
    if [int(n) for n in shape.const_value.numpy().reshape(-1)] != [0, 0, -1]:
        return None
    split = middle.producer()
    if split is None or split.op_type != "Reshape" or split.inputs[0] is None:
        return None
    source = split.inputs[0]
    if source.shape is None or middle.shape is None or len(source.shape) != 3 or len(middle.shape) != 4:
        return None
    same = [str(a) == str(b) for a, b in zip(source.shape[:2], middle.shape[:2], strict=True)]
    return source if all(same) else None
