"""The onnxruntime target: lowered to what stock ONNX Runtime does fastest on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import EnvironmentLacksError
from ...passes.base import PassContext
from ..base import MODEL_FILE, Backend, write_onnx
from .plugin import cpu_plugin_path, cpu_plugin_problem
from .runner import create_session


class OnnxRuntimeBackend(Backend):
    """Fused attention and norms, one MatMul per expert or a loop, whichever is faster here."""

    name = "onnxruntime"
    summary = "lowered for ONNX Runtime on the CPU; fastest with the CPU plugin, and runs without it"

    def environment(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A build with the CPU plugin is another one."""
        return {"cpu_plugin_here": not cpu_plugin_problem()}

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``expert_lowering`` auto: fused where the CPU plugin is.

        Raises:
            EnvironmentLacksError: fused or packed experts or the plugin's quantised ones were asked for, and
                there is no plugin.
        """
        wanted = options.get("expert_lowering", "auto")
        problem = cpu_plugin_problem()
        if options.get("expert_parallel") is not None and problem:
            raise EnvironmentLacksError(f"ep needs the CPU plugin, which exchanges between ranks: {problem}")
        if wanted == "fused" and problem:
            raise EnvironmentLacksError(f"expert_lowering fused needs the CPU plugin: {problem}")
        if options.get("expert_weights") == "packed" and problem:
            raise EnvironmentLacksError(f"expert_weights packed needs the CPU plugin: {problem}")
        if options.get("quantized_lowering") == "plugin" and problem:
            raise EnvironmentLacksError(f"quantized_lowering plugin needs the CPU plugin: {problem}")
        return {
            **options,
            "fused_experts": wanted in ("auto", "fused") and not problem,
            "cpu_plugin": None if problem else cpu_plugin_path(),
        }

    def _write(self, context: PassContext, folder: Path) -> None:
        write_onnx(context, folder)
        # onnx.checker knows no contrib ops: ONNX Runtime itself is asked whether it takes the file. Like this
        # it reads no weights, which may be larger than the memory.
        create_session(folder / MODEL_FILE, threads=1, prepack=False, optimize=False)
