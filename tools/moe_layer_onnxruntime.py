"""The contestants that ONNX Runtime runs: the plugin, and what there is without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_layer import Inputs, Layer, LeftOut, Run, need_memory
from moe_layer_models import KERNELS_ONLY, save_model

from moe_export.backends.onnxruntime.plugin import cpu_plugin_path, cpu_plugin_problem

FORMS = {
    "onnxruntime-moe": "contrib",
    "expert-loop": "loop",
    "qmoe-int8": "qmoe-int8",
    "qmoe-int4": "qmoe-int4",
    "plugin-packed": "packed",
    "plugin-unpacked": "unpacked",
    "plugin-int8": "plugin-int8",
    "plugin-int4": "plugin-int4",
}
"""Contestant to the form of its model."""
QUANTIZED = tuple(name for name in FORMS if name.endswith(("int8", "int4")))


class OnnxRuntime:
    """Sessions over models in ``folder``, one per form and number of threads, made once and kept."""

    names: tuple[str, ...] = tuple(FORMS)

    def __init__(self, layer: Layer, folder: Path) -> None:
        self.layer = layer
        self.folder = folder
        self._sessions: dict[tuple[str, int], Any] = {}

    def make(self, name: str, inputs: Inputs, threads: int) -> Run:
        key = (FORMS[name], threads)
        if key not in self._sessions:
            self._sessions[key] = self._session(*key)
        session = self._sessions[key]
        feed = {"hidden": inputs.hidden, "logits": inputs.logits}
        return lambda: session.run(None, feed)[0]

    def _session(self, form: str, threads: int) -> Any:
        import onnxruntime as ort

        kernels = form in KERNELS_ONLY
        if kernels and cpu_plugin_path() is None:
            raise LeftOut(cpu_plugin_problem())
        if form.endswith(("int8", "int4")) and self.layer.dtype != "float32":
            raise LeftOut("quantised weights are compared with float32; ask for --dtypes float32")
        if not kernels and self.layer.dtype != "float32":
            raise LeftOut(f"ONNX Runtime's CPU kernels multiply no {self.layer.dtype}")
        # Packed beside the original while it is written; kept twice by kernels that pack at load.
        copies = {"unpacked": 0, "contrib": 3, "loop": 3}.get(form, 1)
        need_memory("its model", copies * self.layer.nbytes)
        path = self.folder / form / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            save_model(self.layer, form, path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if cpu_plugin_path() is not None and form not in ("contrib", "loop"):
            options.register_custom_ops_library(str(cpu_plugin_path()))
        if kernels:
            # The weights stay where they are: memory-mapped.
            options.add_session_config_entry("session.disable_prepacking", "1")
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
