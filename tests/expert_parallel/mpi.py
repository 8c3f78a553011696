"""Running programs on real MPI processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MPIEXEC = BIN / "mpiexec"
COMMAND = BIN / "moe-export"

needs_mpi = pytest.mark.skipif(
    not MPIEXEC.is_file() or not COMMAND.is_file(), reason="needs the extra mpi: mpi4py and mpich"
)


@dataclass(frozen=True)
class Done:
    """How a run ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that moe-export said as errors."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def environment(**values: str) -> dict[str, str]:
    """For ranks on few cores: one thread each."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **values}


def start(command: Sequence[str | Path], ranks: int, **values: str) -> subprocess.Popen[str]:
    """``command`` under mpiexec."""
    words = [str(MPIEXEC), "-n", str(ranks), *map(str, command)]
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**values),
    )


def finish(process: subprocess.Popen[str], limit: float = 120.0) -> Done:
    """Wait for its end; a run that is not over after ``limit`` seconds is ended, and fails the test."""
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"mpiexec was not over after {limit:g} s; it said:\n{out}\n{err}")
    return Done(process.returncode, out, err, time.monotonic() - began)


def mpiexec(ranks: int, *command: str | Path, limit: float = 120.0, **values: str) -> Done:
    """Run ``command`` on ``ranks`` ranks."""
    return finish(start(command, ranks, **values), limit)


def script(folder: Path, name: str, text: str) -> list[str | Path]:
    """The command that runs a Python program."""
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    return [sys.executable, file]
