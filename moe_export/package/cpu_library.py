"""The CPU plugin as a file that another program loads: whether a model needs it, and what it needs itself."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from moe_export.backends.onnxruntime.plugin import (
    VARIABLE,
    cpu_plugin_path,
    cpu_plugin_problem,
    register_cpu_plugin,
)
from moe_export.errors import EnvironmentLacksError
from moe_export.ops import DOMAIN

OLDEST_RUNTIME = "1.17"
"""ONNX Runtime whose C API the library asks for."""
_MACHINES = {62: "x86-64", 183: "aarch64"}
_GLIBC = re.compile(rb"GLIBC_(\d+)\.(\d+)(?![\d.])")


@dataclass(frozen=True)
class CpuLibrary:
    """``path``: the file. ``machine``: processors it is for. ``glibc``: the oldest C library it loads "
    "with."""

    path: Path
    machine: str
    glibc: str

    @property
    def needs(self) -> str:
        """What a server must have, in words."""
        return f"Linux on {self.machine}, glibc {self.glibc} or later, ONNX Runtime {OLDEST_RUNTIME} or later"


def cpu_library(model: Path) -> tuple[CpuLibrary | None, tuple[str, ...]]:
    """The plugin for ``model``, and notes. None: it has no op of ours, or the plugin was switched off.

    Raises:
        EnvironmentLacksError: the model's ops need the plugin to be fast, and it cannot be had here.
    """
    import onnx

    proto = onnx.load(model, load_external_data=False)
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        return None, ()
    if os.environ.get(VARIABLE) == "off":
        return None, (
            f"packaged with {VARIABLE}=off, so without the CPU plugin: the experts run by their ONNX bodies, "
            "which is "
            "slower",
        )
    _require_loadable()
    path = cpu_plugin_path()
    assert path is not None  # else there was a problem
    return read_library(path), ()


def _require_loadable() -> None:
    import onnxruntime as ort

    if register_cpu_plugin(ort.SessionOptions()):
        return
    raise EnvironmentLacksError(
        f"the model has ops of the CPU plugin, and there is none to package: {cpu_plugin_problem()}; or set "
        f"{VARIABLE}=off to package it without, slower"
    )


def read_library(path: Path) -> CpuLibrary:
    """What the shared object at ``path`` needs, read from its header and symbol versions.

    Raises:
        EnvironmentLacksError: it is no Linux library for a processor that Triton runs on.
    """
    content = path.read_bytes()
    machine = _MACHINES.get(int.from_bytes(content[18:20], "little"))
    if content[:4] != b"\x7fELF" or machine is None:
        raise EnvironmentLacksError(
            f"{path} is no Linux library for {' or '.join(_MACHINES.values())}, and Triton runs on nothing "
            "else; "
            f"package on such a machine, or name a library for it with {VARIABLE}"
        )
    found = [(int(major), int(minor)) for major, minor in _GLIBC.findall(content)]
    return CpuLibrary(path, machine, ".".join(map(str, max(found, default=(2, 17)))))
