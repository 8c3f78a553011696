"""The CPU plugin as a user of engines meets it: where it is, which bundles use it, what is said without it.

``MOE_EXPORT_CPU_PLUGIN``: ``off`` runs every engine by the ops' ONNX bodies, a path takes that library.
"""

from __future__ import annotations

from pathlib import Path

from moe_export.backends.onnxruntime.plugin import cpu_plugin_path, cpu_plugin_problem, register_cpu_plugin
from moe_export.ops import DOMAIN
from moe_export.schema import Manifest

SLOW_BODIES = ("ExpertMLP", "QuantizedExpertMLP", "GroupedMatMul")
"""Ops whose ONNX body is much slower than their kernel; the others' bodies take little of a layer's time."""


def runs_with_plugin(manifest: Manifest) -> bool:
    """Whether the runtime gives this bundle the plugin. A portable engine runs here as it runs everywhere:
    by the bodies."""
    return manifest.target == "onnxruntime"


def missing_plugin_note(model: Path) -> str | None:
    """One line when ``model`` would be faster with the plugin, which cannot be had now; None otherwise."""
    problem = cpu_plugin_problem()
    if not problem:
        return None
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    count = sum(node.domain == DOMAIN and node.op_type in SLOW_BODIES for node in graph.node)
    if not count:
        return None
    return f"no CPU plugin ({problem}): {count} expert op(s) run by their ONNX bodies, which is slower"


__all__ = [
    "cpu_plugin_path",
    "cpu_plugin_problem",
    "missing_plugin_note",
    "register_cpu_plugin",
    "runs_with_plugin",
]
