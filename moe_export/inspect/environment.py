"""What this machine offers: Python, packages, CPU, memory, and what each target lacks."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from moe_export.backends.trt.library import INSTALL
from moe_export.backends.trt.machine import build_lacks, find_gpu, run_lacks
from moe_export.errors import EnvironmentLacksError
from moe_export.sms import GPU_TARGETS

_CPU_FEATURES = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16",
                 "asimd", "asimddp", "bf16", "i8mm", "sve")  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A Python package. ``version``: None when not installed. ``problem``: why it cannot be imported."""

    name: str
    version: str | None
    used_for: str
    install: str
    problem: str = ""

    @property
    def usable(self) -> bool:
        return self.version is not None and not self.problem


@dataclass(frozen=True)
class TargetStatus:
    """Whether engines for a target can be built and run here; ``lacks``: what is missing, how to get it."""

    name: str
    available: bool
    """Engines can be built and run."""
    runs: bool
    """Engines that were built elsewhere can be run."""
    builds: bool
    """Engines can be built, whether or not they run here."""
    lacks: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    """Everything ``moe-export doctor`` reports."""

    moe_export: str
    python: str
    platform: str
    cpu: dict[str, Any]
    memory: dict[str, int]
    packages: tuple[Package, ...]
    execution_providers: tuple[str, ...]
    cpu_plugin: dict[str, str | None]
    """``path`` (None: not to be had) and ``problem`` (why engines run without it, and how to get it)."""
    gpu: dict[str, Any]
    """``sm`` and ``cuda`` (what the driver supports) of the first NVIDIA GPU; empty without one."""
    targets: tuple[TargetStatus, ...]
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Known:
    module: str
    distributions: tuple[str, ...]
    used_for: str
    install: str


_ONNXRUNTIME_GPU_HERE = (sys.platform, platform.machine()) in (("linux", "x86_64"), ("win32", "AMD64"))
_ORT = "onnxruntime-gpu" if _ONNXRUNTIME_GPU_HERE else "onnxruntime"
_PACKAGES = (
    _Known("onnxruntime", ("onnxruntime-gpu", "onnxruntime"), "running engines", f"pip install {_ORT}"),
    _Known("torch", ("torch",), "reading source models", "pip install torch"),
    _Known("transformers", ("transformers",), "Hugging Face models", "pip install 'moe-export[hf]'"),
    _Known("onnx", ("onnx",), "writing and checking ONNX files", "pip install onnx"),
    _Known("onnx_ir", ("onnx-ir",), "changing graphs", "pip install onnx-ir"),
    _Known("onnxscript", ("onnxscript",), "export from torch", "pip install onnxscript"),
    _Known("numpy", ("numpy",), "arrays", "pip install numpy"),
    _Known("ml_dtypes", ("ml_dtypes",), "bfloat16 arrays", "pip install ml_dtypes"),
    _Known("psutil", ("psutil",), "cores, memory", "pip install psutil"),
    _Known("filelock", ("filelock",), "one writer per output", "pip install filelock"),
    _Known("safetensors", ("safetensors",), "reading weights", "pip install safetensors"),
    _Known("tokenizers", ("tokenizers",), "text in and out", "pip install tokenizers"),
    _Known("jinja2", ("jinja2",), "the HTML report", "pip install jinja2"),
    _Known("matplotlib", ("matplotlib",), "plots", "pip install matplotlib"),
    _Known("triton", ("triton",), "compiling GPU kernels", "pip install 'moe-export[gpu]'"),
    _Known("cuda.bindings", ("cuda-bindings",), "running on a GPU", "pip install 'moe-export[gpu]'"),
    _Known("tensorrt_rtx", ("tensorrt-rtx-cu13",), "TensorRT-RTX engines", INSTALL["tensorrt-rtx"]),
    _Known("tensorrt", ("tensorrt-cu13",), "TensorRT engines", INSTALL["tensorrt"]),
)
_RUN_ONNXRUNTIME = ("onnxruntime", "onnx", "numpy", "ml_dtypes", "psutil")
_BUILD_ONNX = ("torch", "onnx_ir", "onnxscript", "safetensors", "filelock")
_TARGET_NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "onnxruntime": (_RUN_ONNXRUNTIME, _BUILD_ONNX),
    "portable": (_RUN_ONNXRUNTIME, _BUILD_ONNX),
    "tensorrt-rtx": (_RUN_ONNXRUNTIME, _BUILD_ONNX),
    "tensorrt": (_RUN_ONNXRUNTIME, _BUILD_ONNX),
}
"""Target → modules that running an engine needs, and those that building one needs besides."""


def examine() -> Environment:
    """Look at this machine. Imports every package once, to find those that are installed but broken."""
    import moe_export

    packages = {known.module: _package(known, try_import=True) for known in _PACKAGES}
    targets = tuple(_target(name, packages) for name in _TARGET_NEEDS)
    return Environment(
        moe_export=moe_export.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu(),
        memory=_memory(),
        packages=tuple(packages.values()),
        execution_providers=_providers(packages["onnxruntime"]),
        cpu_plugin=_cpu_plugin(packages["onnxruntime"]),
        gpu=_gpu(),
        targets=targets,
        warnings=tuple(_warnings(packages)),
    )


def target_statuses() -> tuple[TargetStatus, ...]:
    """Every target, judged by what is installed; nothing is imported."""
    packages = {known.module: _package(known, try_import=False) for known in _PACKAGES}
    return tuple(_target(name, packages) for name in _TARGET_NEEDS)


def _package(known: _Known, try_import: bool) -> Package:
    name, version = known.distributions[0], None
    for distribution in known.distributions:
        try:
            name, version = distribution, metadata.version(distribution)
            break
        except metadata.PackageNotFoundError:
            continue
    problem = ""
    if version is not None and try_import:
        try:
            import_module(known.module)
        except Exception as error:  # a broken binary package raises anything; the point is to name it
            problem = f"installed, but importing it fails: {type(error).__name__}: {error}"
    return Package(name, version, known.used_for, known.install, problem)


def _target(name: str, packages: dict[str, Package]) -> TargetStatus:
    run, build = _TARGET_NEEDS[name]
    lacks = []
    for module in (*run, *build):
        package = packages[module]
        if not package.usable:
            lacks.append(f"{package.name} ({package.problem or 'not installed'}): {package.install}")
    runs = all(packages[module].usable for module in run)
    builds = not lacks
    if name in GPU_TARGETS:
        building, running = build_lacks(name), run_lacks(name)
        runs, builds = runs and not running, builds and not building
        lacks += list(dict.fromkeys((*building, *running)))
    return TargetStatus(name, runs and builds, runs, builds, tuple(lacks))


def _gpu() -> dict[str, Any]:
    found = find_gpu()
    return {} if found is None else {"sm": found.sm, "cuda": f"{found.cuda[0]}.{found.cuda[1]}"}


def _providers(onnxruntime: Package) -> tuple[str, ...]:
    if not onnxruntime.usable:
        return ()
    return tuple(import_module("onnxruntime").get_available_providers())


def _cpu_plugin(onnxruntime: Package) -> dict[str, str | None]:
    from moe_export.runtime.plugin import cpu_plugin_path, cpu_plugin_problem, register_cpu_plugin

    try:
        path = cpu_plugin_path()
        if path is not None and onnxruntime.usable:
            register_cpu_plugin(import_module("onnxruntime").SessionOptions())
        return {"path": None if path is None else str(path), "problem": cpu_plugin_problem() or None}
    except EnvironmentLacksError as error:
        return {"path": None, "problem": str(error)}


def _warnings(packages: dict[str, Package]) -> Iterator[str]:
    both = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            both.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(both) == 2:
        yield (
            f"{both[0]} and {both[1]} are both installed and overwrite each other's files: "
            f"pip uninstall onnxruntime onnxruntime-gpu, then pip install {_ORT}"
        )
    if not packages["transformers"].usable:
        yield f"without transformers only own modules can be exported: {packages['transformers'].install}"


def _cpu() -> dict[str, Any]:
    psutil = _psutil()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, flags = _cpu_description()
    return {
        "model": model,
        "physical_cores": psutil.cpu_count(logical=False) if psutil else None,
        "logical_cores": os.cpu_count(),
        "usable_cores": usable,
        "features": [name for name in _CPU_FEATURES if name in flags] if flags is not None else None,
    }


def _cpu_description() -> tuple[str, frozenset[str] | None]:
    """Model name and feature flags as the kernel tells them; no flags known outside Linux."""
    path = Path("/proc/cpuinfo")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), None
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())
    flags = frozenset((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name") or platform.machine(), flags


def _memory() -> dict[str, int]:
    """Bytes in all, free for use, and the container's limit where there is a lower one."""
    psutil = _psutil()
    if psutil is None:
        return {}
    memory = psutil.virtual_memory()
    values = {"total": int(memory.total), "available": int(memory.available)}
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit() and int(limit) < values["total"]:
            values["container_limit"] = int(limit)
    return values


def _psutil() -> Any:
    try:
        return import_module("psutil")
    except ModuleNotFoundError:
        return None
