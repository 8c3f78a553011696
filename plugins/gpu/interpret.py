"""Runs the GPU kernels on the CPU, under Triton's interpreter, with numpy arrays in and out.

One worker process serves all calls of this process (starting it takes some seconds). Results are *not run on
a GPU*: ``interpret_worker`` says what is repaired in the interpreter and what it does not show.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.costs.tiles import Tile
from moe_export.errors import CheckFailed, InputError

from .compile import triton_version
from .contract import KernelContract, contract
from .messages import read_message, write_message


def run_interpreted(
    kernel: str,
    arrays: Mapping[str, NDArray[Any]],
    constants: Mapping[str, Any],
    tile: Tile,
    *,
    dtype: str | None = None,
    function: tuple[str, str] | None = None,
) -> dict[str, NDArray[Any]]:
    """One launch of ``kernel`` for the inputs ``arrays`` by name (see its contract); outputs by name.

    bfloat16 arrays are those of ``ml_dtypes``. ``dtype`` of the kernel: by default that of its data inputs.
    ``function``: module and name of another Triton function, for tests of broken kernels. Elements that the
    kernel does not write are NaN (floats) or -777777777 (integers).

    Raises:
        UsageError: unknown kernel, or constants outside its limits.
        InputError: an input is missing, or has a wrong shape or dtype.
        CheckFailed: the kernel fails, ends the process, or writes outside an output.
        EnvironmentLacksError: Triton is not installed.
    """
    rules = contract(kernel)
    full = rules.complete(constants)
    chosen = dtype or _dtype(rules, arrays)
    tokens = _check(rules, full, tile, chosen, arrays)
    active = [t.name for t in rules.active_inputs(full)]
    request = {
        "kernel": kernel,
        "constants": full,
        "tile": tile.to_dict(),
        "dtype": chosen,
        "tokens": tokens,
        "arrays": active,
        "function": function or [f"{__package__}.kernels.{kernel}", kernel],
    }
    answer, data = _SERVER.ask(request, [np.ascontiguousarray(arrays[n]).tobytes() for n in active])
    if "error" in answer:
        raise CheckFailed(f"GPU kernel {kernel} under the interpreter: {answer['error']}")
    return {
        o["name"]: np.frombuffer(piece, _numpy(o["dtype"])).reshape(o["shape"]).copy()
        for o, piece in zip(answer["outputs"], data, strict=True)
    }


def stop() -> None:
    """End the worker process; the next call starts another."""
    _SERVER.stop()


def _numpy(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _dtype(rules: KernelContract, arrays: Mapping[str, NDArray[Any]]) -> str:
    for tensor in rules.inputs:
        if tensor.dtype == "data" and tensor.name in arrays:
            return arrays[tensor.name].dtype.name
    return "float32"


def _check(
    rules: KernelContract,
    constants: Mapping[str, Any],
    tile: Tile,
    dtype: str,
    arrays: Mapping[str, NDArray[Any]],
) -> int:
    """The number of tokens."""
    active = rules.active_inputs(constants)
    names = [t.name for t in active]
    if sorted(names) != sorted(arrays):
        raise InputError(
            f"GPU kernel {rules.name}: inputs {', '.join(sorted(arrays))}; expected "
            f"{', '.join(sorted(names))}"
        )
    tokens = next(arrays[t.name].shape[0] for t in active if t.shape[0] == "T")
    shapes = rules.input_shapes(constants, tile, tokens)
    for tensor in active:
        array, kind = arrays[tensor.name], tensor.dtype_of(dtype, constants)
        if array.shape != shapes[tensor.name] or array.dtype != _numpy(kind):
            raise InputError(
                f"GPU kernel {rules.name}: input {tensor.name} is {array.dtype.name} {list(array.shape)}; "
                f"expected {kind} {list(shapes[tensor.name])}"
            )
    return int(tokens)


class _Server:
    """The worker process, started at the first call."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any], data: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None  # pipes were asked for
            try:
                write_message(process.stdin, request, data)
                answer = read_message(process.stdout)
            except BrokenPipeError:
                answer = None
            if answer is None:
                code, text = process.wait(), self._tail()
                self._close()
                raise CheckFailed(
                    f"GPU kernel {request['kernel']} under the interpreter: the process ended with {code}: "
                    f"{text}"
                )
            return answer

    def stop(self) -> None:
        with self._lock:
            self._close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._close()
            triton_version()
            one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.interpret_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **one_thread, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"},
            )
        return self._process

    def _tail(self) -> str:
        self._log.seek(0)
        return str(self._log.read().decode(errors="replace")).strip()[-400:]

    def _close(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


_SERVER = _Server()
atexit.register(stop)
