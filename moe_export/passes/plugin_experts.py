"""Each MoE layer's experts as one ExpertMLP node that TensorRT's parser hands to the GPU plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..graph.functions import PLUGIN_ATTRIBUTES, attach_functions
from ..ops import DOMAIN, OPS
from ..schema import Alternative, Decision
from .base import Pass, PassContext
from .expert_form import ExpertForm, find_form, replace_output

if TYPE_CHECKING:
    import onnx_ir as ir

LOWERING = "plugin"
"""The ``expert_lowering`` that asks for this pass."""


class PluginExperts(Pass):
    """``option expert_lowering = plugin``: fuse experts for the plugin of ``moe_export_plugins.gpu``.

    The node keeps its function body: where no plugin is registered, runtimes inline it. The attributes
    ``plugin_namespace`` and ``plugin_version`` make TensorRT's parser look for the plugin first. TensorRT
    takes no missing input between or after others, so the node has five inputs, or seven with biases.
    """

    name = "plugin-experts"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        if context.options.get("expert_lowering") != LOWERING:
            return
        chosen: tuple[Any, ...] | None = None
        for layer in context.layers:
            subject = f"{layer.name}: experts"
            found = find_form(context, layer.name)
            if isinstance(found, str):
                context.decisions.append(Decision(subject, "no plugin", found))
                continue
            variant = OPS["ExpertMLP"].variant(found.attributes)
            if chosen is not None and variant != chosen:
                reason = "differs in form from the model's other experts; one body cannot serve both"
                context.decisions.append(Decision(subject, "no plugin", reason))
                continue
            chosen = variant
            _replace(context.model.graph, found)
            context.fused = (*context.fused, layer.index)
            context.decisions.append(
                Decision(
                    subject,
                    "GPU plugin ExpertMLP",
                    f"asked for by expert_lowering = {LOWERING}; its activation is "
                    f"{found.attributes['activation']}, proven by running its nodes",
                    (Alternative("native", "no plugin to install, but TensorRT's own layers only"),),
                )
            )
        if chosen is not None:
            common.RemoveUnusedNodesPass()(context.model)
            attach_functions(context.model, context.opset)


def _replace(graph: ir.Graph, found: ExpertForm) -> None:
    import onnx_ir as ir

    nodes = found.nodes
    biases = [b for b in found.biases if b is not None]
    node = ir.node(
        "ExpertMLP",
        [nodes.hidden, nodes.expert_ids, nodes.weights, *found.weights, *biases],
        attributes={**found.attributes, **PLUGIN_ATTRIBUTES},
        domain=DOMAIN,
        name=f"{found.attributes['layer']}.experts",
    )
    replace_output(graph, nodes, [node])
