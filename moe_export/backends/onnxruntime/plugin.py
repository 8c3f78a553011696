"""The CPU plugin: a library that brings the ops of the ``moe_export`` domain to ONNX Runtime as fast kernels.

Without it the same engines run by the ops' ONNX bodies. The wheel of moe-export holds it as
``moe_export_plugins/cpu/libmoe_export_cpu.so``; the environment variable ``MOE_EXPORT_CPU_PLUGIN`` overrides
that: ``off`` leaves it out, a path takes another build of it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moe_export.errors import EnvironmentLacksError

if TYPE_CHECKING:
    import onnxruntime as ort

VARIABLE = "MOE_EXPORT_CPU_PLUGIN"
_LIBRARY = "libmoe_export_cpu.dylib" if sys.platform == "darwin" else "libmoe_export_cpu.so"
_INSTALL = "install moe-export again where a C++17 compiler is (docs/install.md)"

_refusals: dict[Path, str] = {}
"""What ONNX Runtime said of a library that it could not load."""


def cpu_plugin_path() -> Path | None:
    """Where the plugin lies; None when it is switched off or not installed (:func:`cpu_plugin_problem` says
    which).

    Raises:
        EnvironmentLacksError: ``MOE_EXPORT_CPU_PLUGIN`` names a file that is not there.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced == "off":
        return None
    if forced:
        path = Path(forced)
        if not path.is_file():
            raise EnvironmentLacksError(
                f"{VARIABLE} is {forced!r}, and there is no such file; set it to the library's path or to "
                "'off', or unset it"
            )
        return path.resolve()
    try:
        spec = importlib.util.find_spec("moe_export_plugins")
    except (ImportError, ValueError):  # a package of that name whose loader is broken
        return None
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    files = (Path(folder) / "cpu" / _LIBRARY for folder in folders)
    return next((file for file in files if file.is_file()), None)


def cpu_plugin_problem() -> str:
    """Why engines run without the plugin here, and how to get it, on one line; empty: they run with it."""
    if os.environ.get(VARIABLE) == "off":
        return f"switched off by {VARIABLE}=off"
    path = cpu_plugin_path()
    if path is None:
        return f"not installed; {_INSTALL}"
    return f"{path} cannot be loaded: {_refusals[path]}; {_INSTALL}" if path in _refusals else ""


def register_cpu_plugin(options: ort.SessionOptions) -> bool:
    """Make a session with ``options`` use the plugin's kernels.

    Returns:
        Whether it will; :func:`cpu_plugin_problem` says why not.

    Raises:
        EnvironmentLacksError: ``MOE_EXPORT_CPU_PLUGIN`` names a file that is missing or cannot be loaded.
    """
    from .runner import one_line, ort_error_types

    path = cpu_plugin_path()
    if path is None:
        return False
    try:
        options.register_custom_ops_library(str(path))
    except ort_error_types() as error:
        if os.environ.get(VARIABLE):
            raise EnvironmentLacksError(
                f"{VARIABLE}: ONNX Runtime cannot load {path}: {one_line(error)}"
            ) from error
        _refusals[path] = one_line(error)
        return False
    return True
