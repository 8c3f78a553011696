"""NCCL, which TensorRT's layers exchange through: the library, communicators for TensorRT, a GPU per rank.

The C functions and their arguments are those of NCCL's user guide, "Communicator Creation and Management
Functions". *No communicator was made on a GPU*: without one NCCL refuses, which is as far as tests go.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from moe_export.errors import BundleError, EnvironmentLacksError

INSTALL = "pip install 'moe-export[nccl]'"
LIBRARY = "libnccl.so.2"
VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
"""The driver's list on Linux: a folder for each GPU."""
_ID_BYTES = 128
_DONE, _IN_PROGRESS = 0, 7
"""Of ncclResult_t."""


def choose_gpu(
    local: int, environment: MutableMapping[str, str] = os.environ, driver: Path = DRIVER_GPUS
) -> None:
    """Let this process see one GPU only: that of the ``local``-th rank of its host. To be called before
    anything asks CUDA.

    A launcher that shows each rank one GPU has chosen already. ``driver``: where the driver lists GPUs.

    Raises:
        EnvironmentLacksError: there are fewer GPUs than ranks.
    """
    named = [part.strip() for part in environment.get(VISIBLE, "").split(",") if part.strip()]
    if len(named) == 1:
        return
    listed = sum(1 for _ in driver.iterdir()) if driver.is_dir() else 0
    found = len(named) or listed
    if 0 < found <= local:
        who = f"{VISIBLE} names {found} GPUs" if named else f"this host has {found} GPU(s)"
        raise EnvironmentLacksError(
            f"{who}, and more ranks run here; each needs a GPU of its own: start one rank per GPU"
        )
    environment[VISIBLE] = named[local] if named else str(local)


class _UniqueId(ctypes.Structure):
    """ncclUniqueId, which is passed by value."""

    _fields_ = (("internal", ctypes.c_ubyte * _ID_BYTES),)


def library_path() -> str:
    """The library of the Python package, or the name by which the system finds its own."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        spec = None
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(place) / "lib" / LIBRARY
        if file.is_file():
            return str(file)
    return LIBRARY


class Nccl:
    """The loaded library. TensorRT, which looks for it by its name, then gets the same one."""

    def __init__(self) -> None:
        """
        Raises:
            EnvironmentLacksError: it is not installed.
        """
        try:
            self._library = ctypes.CDLL(library_path(), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise EnvironmentLacksError(
                f"ranks on GPUs exchange through NCCL, and {LIBRARY} is not here: {INSTALL} ({error})"
            ) from error

    def unique_id(self) -> bytes:
        """What all ranks of a new communicator must know; one of them makes it."""
        made = _UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made)

    def communicator(self, unique_id: bytes, rank: int, ranks: int) -> int:
        """Address of this rank's end, on the GPU that is current. Waits, without Python's lock, until all
        ranks call it.

        Raises:
            BundleError: NCCL refuses, in its words.
        """
        handle = ctypes.c_void_p()
        own = _UniqueId.from_buffer_copy(unique_id)
        self._call("ncclCommInitRank", ctypes.byref(handle), ctypes.c_int(ranks), own, ctypes.c_int(rank))
        return int(handle.value or 0)

    def problem(self, communicator: int) -> str:
        """What went wrong while ranks exchanged; empty: nothing that NCCL knows of."""
        code = ctypes.c_int()
        self._call("ncclCommGetAsyncError", ctypes.c_void_p(communicator), ctypes.byref(code))
        return "" if code.value in (_DONE, _IN_PROGRESS) else f"NCCL: {self._text(code.value)}"

    def free(self, communicator: int) -> None:
        """Free this rank's end, without waiting for other ranks. Nothing may use it any more."""
        self._call("ncclCommAbort", ctypes.c_void_p(communicator))

    def _call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code != _DONE:
            raise BundleError(f"NCCL: {name} failed: {self._text(code)}")

    def _text(self, code: int) -> str:
        """What NCCL says of a result, and last said of an error."""
        words = [self._said("ncclGetErrorString", ctypes.c_int(code))]
        words.append(self._said("ncclGetLastError", ctypes.c_void_p()))
        return "; ".join(filter(None, words))

    def _said(self, name: str, argument: Any) -> str:
        function = getattr(self._library, name, None)  # ncclGetLastError: from 2.13 on
        if function is None:
            return ""
        function.restype = ctypes.c_char_p
        return (function(argument) or b"").decode(errors="replace").strip()


def capsule(address: int) -> Any:
    """A communicator as ``IExecutionContext.set_communicator`` takes it: a capsule without a name."""
    make = ctypes.pythonapi.PyCapsule_New
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(address, None, None)
