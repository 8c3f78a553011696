"""Each MoE layer's experts as one ExpertMLP node, where its activation is proven to be one the op has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..graph.functions import attach_functions
from ..ops import DOMAIN, OPS
from ..ops.packing import PANEL_COLUMNS, down_panels, pack_down, pack_up, up_panels
from ..schema import Alternative, Decision
from .base import Pass, PassContext
from .expert_form import ExpertForm, find_form, replace_output

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
            if layer.index in context.quantized:
                continue
            found = find_form(context, layer.name)
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


def _replace(graph: ir.Graph, found: ExpertForm) -> None:
    import onnx_ir as ir

    nodes = found.nodes
    node = ir.node(
        "ExpertMLP",
        [nodes.hidden, nodes.expert_ids, nodes.weights, *found.weights, *found.biases],
        attributes=found.attributes,
        domain=DOMAIN,
    )
    replace_output(graph, nodes, [node])


def _bytes(weights: Sequence[ir.Value]) -> int:
    return sum(v.const_value.nbytes for v in weights if v.const_value is not None)


def _packed_text(before: int, after: int) -> str:
    """What packing costs on disk."""
    grown = f"{100 * (after - before) / before:.1f} % larger" if after > before else "no larger"
    return f"packed in panels of 64 columns, {after / 2**20:.1f} MiB, {grown}; packed once, here"


class _Packer:
    """Packs expert weights of one graph when they are written, one expert at a time; a weight that two layers
    share is packed once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[int, ir.Value] = {}

    def pack(self, found: ExpertForm) -> ExpertForm:
        """``found`` with packed weights, and with its up bias in the order of packed columns."""
        import numpy as np

        given = found.attributes
        form = {"gated": bool(given["gated"]), "layout": given["layout"]}
        transposed = bool(given["transposed"])
        up, down = found.weights
        bias = found.biases[0]
        up_depth, up_columns = _sizes(up, transposed)
        down_depth, down_columns = _sizes(down, transposed)
        inner = up_columns // 2 if form["gated"] else up_columns
        packed = (
            self._stored(
                up,
                lambda matrix: pack_up(matrix[None], **form, transposed=transposed)[0],
                (up_panels(inner, form["gated"]), up_depth, PANEL_COLUMNS),
            ),
            self._stored(
                down,
                lambda matrix: pack_down(matrix[None], transposed=transposed)[0],
                (down_panels(down_columns), down_depth, PANEL_COLUMNS),
            ),
        )
        if bias is not None and given["gated"] and given["layout"] == "interleaved":
            bias = self._stored(bias, lambda row: np.concatenate([row[0::2], row[1::2]]), (up_columns,))
        attributes = {**given, "packed": 1, "transposed": 0, "layout": "concatenated"}
        return dataclasses.replace(
            found,
            weights=packed,
            biases=(bias, found.biases[1]),
            attributes=OPS["ExpertMLP"].complete(attributes),
        )

    def _stored(
        self, value: ir.Value, change: Callable[[Any], Any], shape: tuple[int, ...]
    ) -> ir.Value:
        import onnx_ir as ir

        from ..graph.expert_stacks import stack_of

        if id(value) not in self._made:
            assert value.const_value is not None
            tensor = stack_of(value.const_value).each(change, shape, f"{value.name}.packed")
            held = ir.Value(
                name=tensor.name, const_value=tensor, type=value.type, shape=ir.Shape(tensor.shape)
            )
            self._graph.register_initializer(held)
            self._made[id(value)] = held
        return self._made[id(value)]


def _sizes(weight: ir.Value, transposed: bool) -> tuple[int, int]:
    """Rows in and columns out of each expert's matrix."""
    assert weight.const_value is not None
    _, a, b = weight.const_value.shape.numpy()
    return (a, b) if transposed else (b, a)
