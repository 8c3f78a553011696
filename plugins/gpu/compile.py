"""Compiles the kernels ahead of time, for any SM, on a machine without a GPU; results are cached on disk.

The key of the cache is everything the result depends on: constants, dtype, tile, SM, the kernels' sources
and the version of Triton. Its folder is ``MOE_EXPORT_KERNEL_CACHE``, or ``moe-export/kernels`` in the user's
cache folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moe_export.costs.tiles import Tile
from moe_export.errors import EnvironmentLacksError, ExportError, UsageError, choices_text

from .contract import DTYPES, contract
from .sm import find_sm

VARIABLE = "MOE_EXPORT_KERNEL_CACHE"
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Request:
    """One kernel to compile. ``constants`` may be incomplete; ``sm`` as :func:`find_sm` takes it.

    ``function``: module and name of another Triton function, for tests of broken kernels.

    Raises:
        UsageError: unknown kernel, dtype or SM, or constants outside the kernel's limits.
    """

    kernel: str
    constants: Mapping[str, Any]
    dtype: str
    sm: str
    tile: Tile
    function: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", contract(self.kernel).complete(self.constants))
        object.__setattr__(self, "sm", find_sm(self.sm).name)
        if self.dtype not in DTYPES:
            raise UsageError(f"GPU kernels: no dtype {self.dtype!r}; {choices_text(self.dtype, DTYPES)}")

    @property
    def key(self) -> str:
        """SHA-256 of everything the result depends on."""
        text = json.dumps(
            [
                self.kernel, dict(self.constants), self.dtype, self.sm, self.tile.to_dict(), self.function,
                self.arguments, str(find_sm(self.sm)), _sources(), triton_version(),
            ],
            sort_keys=True,
        )  # fmt: skip
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def arguments(self) -> list[tuple[str, str]]:
        """(name, dtype) of the kernel's arguments as the contract has them."""
        rules = contract(self.kernel)
        dtypes = {t.name: t.dtype_of(self.dtype, self.constants) for t in (*rules.inputs, *rules.outputs)}
        return [(name, dtypes.get(name, "scalar")) for name, _ in rules.parameters(self.constants)]

    @property
    def entry(self) -> str:
        """Name of the function: kernels of one plan must not share one. The same for every SM."""
        text = json.dumps(
            [dict(self.constants), self.dtype, self.tile.to_dict(), self.function, _sources()], sort_keys=True
        )
        return f"moe_export_{self.kernel}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def to_json(self) -> dict[str, Any]:
        """What the worker process reads."""
        return {
            "kernel": self.kernel,
            "constants": dict(self.constants),
            "dtype": self.dtype,
            "sm": self.sm,
            "tile": self.tile.to_dict(),
            "entry": self.entry,
            "function": self.function or [f"{__package__}.kernels.{self.kernel}", self.kernel],
        }


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one SM. Not run on a GPU.

    ``ptx`` and ``cubin`` hold one function, ``entry``. ``parameters``: ``pointer`` or ``int32`` each, as the
    machine code has them; ``parameter_names`` as the Triton function has them. ``shared_bytes``: dynamic
    shared memory to ask for at launch. ``spill_bytes``: registers spilled to memory. ``grid``: expressions
    (``expressions.evaluate``).
    """

    kernel: str
    constants: Mapping[str, Any]
    dtype: str
    sm: str
    tile: Tile
    entry: str
    ptx: str
    cubin: bytes
    parameters: tuple[str, ...]
    parameter_names: tuple[str, ...]
    registers: int
    shared_bytes: int
    spill_bytes: int
    tensor_instructions: Mapping[str, int]
    triton: str

    @property
    def num_warps(self) -> int:
        return self.tile.warps

    @property
    def grid(self) -> tuple[str, str, str]:
        return contract(self.kernel).grid

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that can be resident, computed from the data sheet."""
        return find_sm(self.sm).occupancy(self.registers, self.shared_bytes, self.num_warps)


def compile_kernel(
    name: str, constants: Mapping[str, Any], dtype: str, sm: str | int, tile: Tile
) -> CompiledKernel:
    """One kernel, from the cache or compiled (a second or two). See :func:`compile_kernels`."""
    return compile_kernels([Request(name, constants, dtype, str(sm), tile)])[0]


def compile_kernels(requests: Sequence[Request]) -> list[CompiledKernel]:
    """Compile several in one worker process; those in the cache cost nothing.

    Raises:
        EnvironmentLacksError: Triton is not installed.
        ExportError: a kernel does not compile, or the compiler ended the process.
    """
    found = {r.key: _load(r) for r in requests}
    missing = {r.key: r for r in requests if found[r.key] is None}
    if missing:
        _worker_compiles(list(missing.values()))
        found |= {key: _load(r) for key, r in missing.items()}
    results = []
    for request in requests:
        result = found[request.key]
        if result is None:
            raise ExportError(f"the kernel cache {cache_folder()} does not keep files; set {VARIABLE}")
        results.append(result)
    return results


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "moe-export" / "kernels"


@cache
def triton_version() -> str:
    """Version of the installed Triton, without importing it.

    Raises:
        EnvironmentLacksError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        raise EnvironmentLacksError(
            "compiling GPU kernels needs Triton; install it with: pip install 'moe-export[gpu]'"
        ) from None


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    files = (
        *sorted((_HERE / "kernels").glob("*.py")),
        *(_HERE / f for f in ("constexprs.py", "ptx.py")),
    )
    for path in (*files, _HERE / "compile_worker.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _worker_compiles(requests: list[Request]) -> None:
    triton_version()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.compile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None  # pipes were asked for
        try:
            for request in requests:
                try:
                    process.stdin.write(json.dumps(request.to_json()) + "\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                except BrokenPipeError:
                    line = ""
                if not line:
                    process.wait()
                    log.seek(0)
                    raise ExportError(
                        f"{_what(request)}: the compiler ended its process (code {process.returncode}): "
                        f"{log.read().strip()[-400:]}"
                    )
                answer = json.loads(line)
                if "error" in answer:
                    raise ExportError(f"{_what(request)}: {answer['error']}")
                _store(request, answer["result"])
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _what(request: Request) -> str:
    return f"GPU kernel {request.kernel} ({request.dtype}, {request.sm}, tile {request.tile})"


def _path(request: Request) -> Path:
    return cache_folder() / f"{request.kernel}-{request.key[:32]}.json"


def _store(request: Request, result: Mapping[str, Any]) -> None:
    path = _path(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"key": request.key, "entry": request.entry, **result}), encoding="utf-8")
    part.replace(path)


def _load(request: Request) -> CompiledKernel | None:
    try:
        found = json.loads(_path(request).read_text(encoding="utf-8"))
        if found["key"] != request.key:
            return None
        sizes = {8: "pointer", 4: "int32"}
        return CompiledKernel(
            request.kernel,
            request.constants,
            request.dtype,
            request.sm,
            request.tile,
            found["entry"],
            found["ptx"],
            base64.b64decode(found["cubin"]),
            tuple(sizes.get(n, f"{n} bytes") for n in found["parameter_bytes"]),
            tuple(found["names"]),
            found["registers"],
            found["shared_bytes"],
            found["spill_bytes"],
            found["tensor_instructions"],
            found["triton"],
        )
    except (OSError, ValueError, KeyError):  # not there, or a damaged file: compiled again
        return None
