"""The portable model as a target: standard ops, our ops with their bodies, no lowering."""

from __future__ import annotations

from pathlib import Path

from ...passes.base import PassContext
from ..base import Backend, write_onnx


class PortableBackend(Backend):
    """Runs in any ONNX runtime that has the opset."""

    name = "portable"
    summary = "standard ONNX and moe_export ops with function bodies; runs in any ONNX runtime"

    def _write(self, context: PassContext, folder: Path) -> None:
        write_onnx(context, folder, standard_only=True)
