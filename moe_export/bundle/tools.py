"""Versions of the tools that make and run a bundle."""

from __future__ import annotations

import platform
import re
from importlib import metadata

import moe_export

_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnx-ir": ("onnx-ir",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    "numpy": ("numpy",),
}


def installed_version(tool: str) -> str | None:
    """Version of an installed tool (a name of :func:`tool_versions`), or None. Imports nothing."""
    for distribution in _DISTRIBUTIONS.get(tool, (tool,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def tool_versions() -> dict[str, str]:
    """Tool → version of what is installed, moe-export and Python included."""
    versions = {"moe-export": moe_export.__version__, "python": platform.python_version()}
    for tool in _DISTRIBUTIONS:
        version = installed_version(tool)
        if version is not None:
            versions[tool] = version
    return versions


def major_minor(version: str) -> tuple[int, int] | None:
    """``(1, 31)`` of ``1.31.1`` or ``1.31.0.dev1+cpu``; None when the text is not a version."""
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?![0-9])", version)
    return (int(match[1]), int(match[2])) if match else None
