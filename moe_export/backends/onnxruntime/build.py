"""The onnxruntime target: lowered to what stock ONNX Runtime does fastest on a CPU."""

from __future__ import annotations

from pathlib import Path

from ...passes.base import PassContext
from ..base import MODEL_FILE, Backend, write_onnx
from .runner import create_session


class OnnxRuntimeBackend(Backend):
    """Fused attention and norms, one MatMul per expert or a loop, whichever is faster here."""

    name = "onnxruntime"
    summary = "lowered for stock ONNX Runtime on the CPU; no library of moe-export needed"

    def _write(self, context: PassContext, folder: Path) -> None:
        write_onnx(context, folder)
        # onnx.checker knows no contrib ops: ONNX Runtime itself is asked whether it takes the file.
        create_session(folder / MODEL_FILE, threads=1)
