"""The portable model as a target: standard ops, our ops with their bodies, no lowering."""

from __future__ import annotations

from pathlib import Path

from ...errors import ExportError
from ...passes.base import PassContext
from ..base import MODEL_FILE, Backend, write_onnx


class PortableBackend(Backend):
    """Runs in any ONNX runtime that has the opset."""

    name = "portable"
    summary = "standard ONNX and moe_export ops with function bodies; runs in any ONNX runtime"

    def _write(self, context: PassContext, folder: Path) -> None:
        import onnx

        write_onnx(context, folder)
        try:
            onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the written model is not valid ONNX: {str(error).splitlines()[0]}") from error
