"""A contestant in a process of its own, spoken to in JSON lines; or, for a live module, in this process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any, Protocol

from ..errors import MoeExportError
from ..runtime.launch import without_launcher
from .runner import Host, NotPossible, Runner

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_TAIL = 300


class Failed(Exception):
    """A contestant died, took too long or raised; the text says what happened."""


class Seat(Protocol):
    """Where a contestant runs."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes on this host."""
        ...

    def call(self, op: str, timeout: float, **values: Any) -> dict[str, Any]:
        """Ask for an operation of :class:`moe_export.bench.runner.Host`.

        Raises:
            NotPossible: the contestant cannot do it, for the reason given.
            Failed: it died, raised, or took longer than ``timeout`` seconds.
            MoeExportError: it met an error that is the user's to solve.
        """
        ...

    def close(self) -> None:
        """End it."""
        ...


class ProcessSeat:
    """Starts ``python -m moe_export.bench.worker`` with ``spec``; the process waits in silence between
    requests."""

    def __init__(self, spec: dict[str, Any], threads: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moe_export.bench.worker", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=_environment(threads),
        )  # fmt: skip
        self._lines: queue.Queue[bytes] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True).start()

    @property
    def pids(self) -> tuple[int, ...]:
        return (self._process.pid,)

    def call(self, op: str, timeout: float, **values: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **values}).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # The pipe is broken, or was closed here after a timeout.
            raise Failed(self._death()) from None
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise Failed(f"{op} took longer than {timeout:.0f} s") from None
        if not line:
            raise Failed(self._death())
        answer: dict[str, Any] = json.loads(line)
        if "not_possible" in answer:
            raise NotPossible(answer["not_possible"])
        if "user_error" in answer:
            raise MoeExportError(answer["user_error"])
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # A request the dead process never read.
                    pipe.close()
        self._log.close()

    def _death(self) -> str:
        """What became of the process."""
        code = self._process.wait()
        if self._log.closed:
            return "its process was ended before"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1][-_TAIL:]}" if lines else ""
        if code == -signal.SIGKILL:
            return f"its process was killed (probably out of memory){said}"
        return f"its process ended with code {code}{said}"


class LocalSeat:
    """Runs in the caller's process: for a module that only exists there. Its memory cannot be told apart."""

    def __init__(self, runner: Runner) -> None:
        self._host = Host(runner)

    @property
    def pids(self) -> tuple[int, ...]:
        return (os.getpid(),)

    def call(self, op: str, timeout: float, **values: Any) -> dict[str, Any]:
        if op == "memory":
            return {"peak_rss": None}
        try:
            return self._host.handle({"op": op, **values})
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            raise Failed(first_line(error)) from error

    def close(self) -> None:
        return None


def first_line(error: BaseException) -> str:
    """``ValueError: what happened`` on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:_TAIL]}" if lines else type(error).__name__


def _pump(stream: IO[bytes], lines: queue.Queue[bytes]) -> None:
    """Hand over lines as they come; an empty one at the end."""
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    # A contestant is no rank, even where the benchmark is one.
    inherited = without_launcher(os.environ)
    return {**inherited, **offline, "PYTHONPATH": path, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
