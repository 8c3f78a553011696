"""ONNX Runtime's own fused attention and norms, through transformers' fusions (which use onnxscript's)."""

from __future__ import annotations

from ..graph.functions import attach_functions
from ..graph.moe_values import rename_moe_values
from ..graph.onnxscript_rewrites import exact_rewrites
from ..schema import Decision
from .base import Pass, PassContext
from .fusion_steps import steps_replaced
from .mixed_norms import bias_kept
from .sibling_products import pack_sibling_products


class LibraryFusions(Pass):
    """Fuse norms, rotary embeddings and grouped-query attention into ONNX Runtime's contrib ops."""

    name = "library-fusions"

    def _run(self, context: PassContext) -> None:
        try:
            from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("transformers"):
                raise
            context.decisions.append(
                Decision("attention and norms", "plain nodes", "transformers is not installed")
            )
            return
        before = {n.op_type for n in context.model.graph if n.domain == "com.microsoft"}
        count = len(list(context.model.graph))
        # The fusions inline every function they find: our ops' bodies are put back afterwards.
        context.model.functions.clear()
        own_packing = steps_replaced({"_pack_sibling_matmuls": pack_sibling_products})
        with exact_rewrites(), bias_kept(), own_packing:
            fuse_for_onnxruntime(context.model, "cpu")
        attach_functions(context.model, context.opset)
        rename_moe_values(context.model, context.layers)
        fused: dict[str, int] = {}
        for node in context.model.graph:
            if node.domain == "com.microsoft" and node.op_type not in before:
                fused[node.op_type] = fused.get(node.op_type, 0) + 1
        text = ", ".join(f"{name} x{n}" for name, n in sorted(fused.items())) or "nothing matched"
        context.decisions.append(
            Decision(
                "attention and norms",
                f"fused: {text}",
                f"ONNX Runtime's contrib kernels; {count} nodes became {len(list(context.model.graph))}",
            )
        )
