"""The portable model as a target: standard ops, our ops with their bodies, no lowering."""

from __future__ import annotations

import shutil
import tempfile
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
            if any(path.stat().st_nlink > 1 for path in folder.rglob("*") if path.is_file()):
                _check_beside_stand_ins(folder)
            else:
                onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the written model is not valid ONNX: {str(error).splitlines()[0]}") from error


def _check_beside_stand_ins(folder: Path) -> None:
    """onnx's checker on the model beside empty files of the weight files' sizes.

    It looks at where tensors lie, not at their values, and refuses files of several names, which the links to
    a checkpoint's files are.
    """
    import onnx

    with tempfile.TemporaryDirectory(dir=folder) as name:
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            target = Path(name) / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.name == MODEL_FILE:
                shutil.copyfile(path, target)
            else:
                with target.open("wb") as stream:
                    stream.truncate(path.stat().st_size)
        onnx.checker.check_model(str(Path(name) / MODEL_FILE), full_check=True)
