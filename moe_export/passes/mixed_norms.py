"""Norms with a float32 weight inside a float16 model, in a form that ONNX Runtime accepts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..schema import Decision
from .base import Pass, PassContext
from .fusion_steps import steps_replaced

if TYPE_CHECKING:
    import onnx_ir as ir


class SplitMixedNorms(Pass):
    """Split a fused sum and norm again where the weight's dtype is not the sum's.

    onnxscript fuses both into SkipSimplifiedLayerNormalization without comparing their dtypes; ONNX Runtime
    refuses the result. The norm alone (SimplifiedLayerNormalization) may have a weight of another dtype.
    Families that keep their norms in float32 (gpt-oss) have such norms in float16.
    """

    name = "split-mixed-norms"

    def _run(self, context: PassContext) -> None:
        count = split_mixed_norms(context.model)
        if count:
            context.decisions.append(
                Decision(
                    "norms with a float32 weight",
                    f"sum and norm apart: {count}",
                    "ONNX Runtime's SkipSimplifiedLayerNormalization takes one dtype only",
                )
            )


def split_mixed_norms(model: ir.Model) -> int:
    """Split every fused sum and norm of several dtypes; how many there were."""
    mixed = [node for node in model.graph if _is_mixed(node)]
    for node in mixed:
        _split(model.graph, node)
    return len(mixed)


@contextmanager
def bias_kept() -> Iterator[None]:
    """Inside, transformers' fusions split mixed norms with :func:`split_mixed_norms`.

    Their own step forgets the bias of the sum (the node's fourth input): the engine then computes without the
    bias of the projection before the norm.

    Raises:
        EnvironmentLacksError: this transformers does not have the step where it is known to be.
    """
    with steps_replaced({"_unfuse_mixed_dtype_skip_norms": split_mixed_norms}):
        yield


def _is_mixed(node: ir.Node) -> bool:
    if node.op_type != "SkipSimplifiedLayerNormalization":
        return False
    dtypes = {value.dtype for value in node.inputs[:3] if value is not None and value.dtype is not None}
    return len(dtypes) > 1


def _split(graph: ir.Graph, node: ir.Node) -> None:
    import onnx_ir as ir

    value, skip, weight, *bias = node.inputs
    assert value is not None and weight is not None
    total = value
    added = []
    for other in (skip, *bias):
        if other is None:
            continue
        add = ir.node("Add", [total, other])
        total = add.outputs[0]
        total.type, total.shape = value.type, value.shape
        added.append(add)
    norm = ir.node(
        "SimplifiedLayerNormalization",
        [total, weight],
        attributes={
            "axis": -1,
            "epsilon": node.attributes.get_float("epsilon", 1e-5),
            "stash_type": int(ir.DataType.FLOAT),
        },
    )
    norm.outputs[0].type, norm.outputs[0].shape = weight.type, value.shape
    graph.insert_before(node, [*added, norm])
    replaced = [(node.outputs[0], norm.outputs[0])]
    if len(node.outputs) > 3:
        replaced.append((node.outputs[3], total))
    for old, new in replaced:
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}.fused", name
    graph.remove(node, safe=True)
