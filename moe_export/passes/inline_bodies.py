"""Ops of ours that are no plugin give way to their bodies, for parsers that are strict about function
calls."""

from __future__ import annotations

from ..graph.functions import PLUGIN_ATTRIBUTES, attach_functions
from ..ops import DOMAIN
from . import trt_moe
from .base import Pass, PassContext


class InlineBodies(Pass):
    """Inline every function but those of plugin nodes and of TensorRT's own MoE layer.

    TensorRT's parser inlines functions itself, but refuses a call that leaves a trailing optional input out.
    """

    name = "inline-bodies"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        model = context.model
        plugins = {
            node.op_identifier()
            for node in model.graph.all_nodes()
            if node.domain == DOMAIN and set(PLUGIN_ATTRIBUTES) <= set(node.attributes)
        }
        kept = {*plugins, (trt_moe.DOMAIN, trt_moe.OP, "")}
        common.InlinePass(lambda function: function.identifier() not in kept)(model)
        common.RemoveUnusedNodesPass()(model)
        if plugins:
            # The bodies of plugins call other ops of ours, whose functions are to stay.
            attach_functions(model, context.opset)
        else:
            model.graph.opset_imports.pop(DOMAIN, None)
