"""What of this machine a TensorRT target can use: GPU, driver, packages; and what would make the rest
available."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from dataclasses import dataclass

from moe_export.config import GPU_LOWERINGS
from moe_export.schema import DTYPES
from moe_export.sms import FIRST_SM, SMS, sms_of

from .build_engine import gpu_sm
from .library import DRIVER, library_problem

CUDA = (13, 0)
"""The CUDA version a driver must support; driver 580 is the first with 13.0."""
RUN_EXTRA = "pip install 'moe-export[gpu]'"


@dataclass(frozen=True)
class GpuFound:
    """The first NVIDIA GPU. ``cuda``: what its driver supports, as (13, 0)."""

    sm: int
    cuda: tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One line of the matrix of :func:`target_matrix`. ``builds``, ``runs``: on this machine."""

    target: str
    sm: int
    gpus: str
    dtypes: tuple[str, ...]
    lowerings: tuple[str, ...]
    builds: bool
    runs: bool
    lacks: tuple[str, ...]


def find_gpu() -> GpuFound | None:
    """The GPU here, asked of the driver; None without one."""
    sm = gpu_sm()
    if sm is None:
        return None
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return GpuFound(sm, (version.value // 1000, version.value % 1000 // 10))


def gpu_identity() -> str:
    """What no other GPU anywhere has (the UUID) of the GPU here; empty without one."""
    if gpu_sm() is None:
        return ""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetUuid(found, device):
        return ""
    return bytes(found).hex()


def build_lacks(target: str, sm: int | None = None) -> tuple[str, ...]:
    """What is missing here to build plans (for ``sm``), each with how to get it."""
    lacks = [f"building: {problem}"] if (problem := library_problem(target)) else []
    if target == "tensorrt":
        here = find_gpu()
        if here is None:
            lacks.append("building: the NVIDIA GPU that the plan is for")
        elif sm is not None and here.sm != sm:
            lacks.append(f"building: a GPU of SM{sm} (here: SM{here.sm})")
    return tuple(lacks)


def run_lacks(target: str, sm: int | None = None) -> tuple[str, ...]:
    """What is missing here to run plans (for ``sm``), each with how to get it."""
    lacks = [f"running: {problem}"] if (problem := library_problem(target)) else []
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        lacks.append(f"running: cuda-bindings is not installed: {RUN_EXTRA}")
    here = find_gpu()
    if here is None:
        wanted = f"of SM{sm}" if sm is not None else "of one of the target's SMs"
        lacks.append(f"running: an NVIDIA GPU {wanted} with driver {DRIVER} or later")
    elif sm is not None and here.sm != sm:
        lacks.append(f"running: a GPU of SM{sm} (here: SM{here.sm})")
    elif here.cuda < CUDA:
        lacks.append(f"running: driver {DRIVER} or later (here: one for CUDA {here.cuda[0]}.{here.cuda[1]})")
    return tuple(lacks)


def plugin_sms() -> tuple[int, ...]:
    """The SMs that the GPU plugin's kernels are compiled for."""
    try:
        module = importlib.import_module("moe_export_plugins.gpu.sm")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "moe_export_plugins":
            raise
        return ()
    return tuple(sm.number for sm in module.SMS.values())


def lowerings_of(sm: int) -> tuple[str, ...]:
    """Expert lowerings for an SM."""
    return tuple(n for n in GPU_LOWERINGS if n != "auto" and (n != "plugin" or sm in plugin_sms()))


def target_matrix(target: str) -> tuple[Row, ...]:
    """Every SM of ``target``: dtypes, lowerings, what works on this machine, and what would make it work."""
    rows = []
    for sm in sms_of(target):
        build, run = build_lacks(target, sm), run_lacks(target, sm)
        dtypes = tuple(d for d in DTYPES if sm >= FIRST_SM[target][d])
        rows.append(
            Row(
                target=target,
                sm=sm,
                gpus=SMS[sm].gpus,
                dtypes=dtypes,
                lowerings=lowerings_of(sm),
                builds=not build,
                runs=not run,
                lacks=tuple(dict.fromkeys((*build, *run))),
            )
        )
    return tuple(rows)
