"""Memory and streams of an NVIDIA GPU, through ``cuda-bindings``. *Not run on a GPU.*"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import BundleError, EnvironmentLacksError

from .machine import RUN_EXTRA

_LEAST = 256
"""Bytes of the smallest buffer: TensorRT wants an address for tensors of no element, too."""


_NOT_READY = 600
"""cudaErrorNotReady: work is queued."""
_SPIN = 0.002
_NAP = 0.0002
"""Seconds that a wait for other processes looks without a pause, and its pauses then."""


class Stream:
    """A CUDA stream of the first GPU that this process sees, and memory in its order."""

    def __init__(self) -> None:
        """
        Raises:
            EnvironmentLacksError: cuda-bindings is not installed. BundleError: CUDA refuses.
        """
        try:
            from cuda.bindings import runtime
        except ModuleNotFoundError as error:
            raise EnvironmentLacksError(
                f"running on a GPU needs cuda-bindings, which is not installed: {RUN_EXTRA}"
            ) from error
        self._cuda = runtime
        self._call("cudaSetDevice", 0)
        (self._stream,) = self._call("cudaStreamCreate")
        self.handle = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        error, *values = getattr(self._cuda, name)(*arguments)
        if int(error) != 0:
            raise BundleError(f"CUDA: {name} failed: {error.name}")
        return tuple(values)

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """Memory for an array; freed with the last reference to it."""
        size = max(math.prod(shape) * dtype.itemsize, _LEAST)
        (pointer,) = self._call("cudaMallocAsync", size, self._stream)
        array = DeviceArray(int(pointer), tuple(int(n) for n in shape), dtype)
        weakref.finalize(array, self._cuda.cudaFreeAsync, pointer, self._stream)
        return array

    def to_device(self, array: NDArray[Any]) -> DeviceArray:
        """A copy on the GPU; ``array`` may change after the next :meth:`wait`."""
        held = np.ascontiguousarray(array)
        made = self.empty(held.shape, held.dtype)
        if held.nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            self._call("cudaMemcpyAsync", made.pointer, held.ctypes.data, held.nbytes, kind, self._stream)
            self.wait()
        return made

    def to_host(self, array: DeviceArray) -> NDArray[Any]:
        """A copy in main memory."""
        made = np.empty(array.shape, array.dtype)
        if made.nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._call("cudaMemcpyAsync", made.ctypes.data, array.pointer, made.nbytes, kind, self._stream)
            self.wait()
        return made

    def wait(self, problem: Callable[[], str] | None = None) -> None:
        """Until everything queued is done.

        ``problem``: of work that waits for other processes, asked now and then; a text ends the wait.

        Raises:
            BundleError: there is a problem.
        """
        if problem is None:
            self._call("cudaStreamSynchronize", self._stream)
        else:
            wait_until(self._done, problem)

    def _done(self) -> bool:
        (error,) = self._cuda.cudaStreamQuery(self._stream)
        if int(error) == _NOT_READY:
            return False
        if int(error) != 0:
            raise BundleError(f"CUDA: cudaStreamQuery failed: {error.name}")
        return True


def wait_until(done: Callable[[], bool], problem: Callable[[], str]) -> None:
    """Poll ``done``: without a pause at first, since most runs are short.

    Raises:
        BundleError: ``problem`` says what is wrong.
    """
    began = time.monotonic()
    while not done():
        if time.monotonic() - began < _SPIN:
            continue
        wrong = problem()
        if wrong:
            raise BundleError(wrong)
        time.sleep(_NAP)


class DeviceArray:
    """An array on the GPU: row-major, of ``shape`` and ``dtype``, at ``pointer``."""

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.pointer = pointer
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize
