"""TensorRT's Python packages: what is installed, and the folder that makes the RTX wheel's library names
resolve."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from importlib import metadata
from pathlib import Path

from .build_engine import version_fault

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Target → Python module of its library."""
INSTALL = {
    "tensorrt-rtx": "pip install 'moe-export[tensorrt-rtx]'",
    "tensorrt": "pip install 'moe-export[tensorrt]'",
}
DRIVER = "580"
"""The lowest driver of CUDA 13, which both libraries are built with (NVIDIA's CUDA toolkit release notes)."""
_DISTRIBUTIONS = {
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx"),
    "tensorrt": ("tensorrt-cu13", "tensorrt"),
}
_SHARED_OBJECT = re.compile(r"(lib[\w+-]+\.so)\.[\d.]+")


def library_version(target: str) -> str | None:
    """Version of the target's library; None: not installed. Imports nothing."""
    module = MODULES[target]
    if importlib.util.find_spec(module) is None:
        return None
    for name in _DISTRIBUTIONS[module]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def library_problem(target: str) -> str:
    """Why the target's library cannot be used here, and how to get one that can; empty: it can."""
    version = library_version(target)
    if version is None:
        return f"{MODULES[target]} is not installed: {INSTALL[target]}"
    fault = version_fault(MODULES[target], version)
    return f"{fault}: {INSTALL[target]}" if fault else ""


def make_link_folder(module: str, folder: Path) -> dict[str, str]:
    """Fill ``folder`` with links that give each library of the wheel its bare name, and return the
    environment in
    which a child process finds them.

    The RTX wheel ships ``libtensorrt_rtx.so.1`` only, while its ONNX parser opens ``libtensorrt_rtx.so``
    when a
    plugin is used, and aborts the process where that is missing.
    """
    environment = dict(os.environ)
    spec = importlib.util.find_spec(f"{module}_libs")
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    if sys.platform != "linux" or not places:
        return environment
    for place in places:
        for file in Path(place).iterdir():
            name = _SHARED_OBJECT.fullmatch(file.name)
            if name is not None and not (folder / name[1]).exists():
                (folder / name[1]).symlink_to(file)
    before = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    return environment
