"""Brings the baselines of a benchmark in, one by one; the export may work beside another one's compiler."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from ..errors import MoeExportError
from .contest import Contest
from .contestants import BASELINES, COMPILE, EXPORT, EXPORT_FUSED, EXPORTER, make_runner
from .process import Failed, LocalSeat, ProcessSeat, Seat
from .result import EAGER
from .runner import NotPossible
from .source import BaselineSource

EXPORT_SECONDS = 1800.0
SPARE_BYTES = 512 << 20


class Entrants:
    """Loads baselines into a contest. A context manager that ends an export that is still under way."""

    def __init__(
        self, contest: Contest, source: BaselineSource, task: str, threads: int, cached: bool
    ) -> None:
        """``cached``: the engine has a KV cache, so exports must have one too."""
        self._contest = contest
        self._source = source
        self._task = task
        self._threads = threads
        self._cached = cached
        self._pool = ThreadPoolExecutor(1)
        self._exporter: Seat | None = None
        self._exported: Future[dict[str, Any] | str] | None = None

    def __enter__(self) -> Entrants:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._exporter is not None:
            self._exporter.close()
        self._pool.shutdown()

    def enter(self, names: Sequence[str], model_bytes: int) -> None:
        """Enter the baselines ``names``; ``model_bytes``: size of the weights in float32."""
        for name in names:
            reason = self._cannot((name,), model_bytes)
            if reason:
                self._contest.skip(name, reason)
                continue
            if name not in (EXPORT, EXPORT_FUSED):
                if name == COMPILE and EXPORT in names and not self._cannot((COMPILE, EXPORT), model_bytes):
                    self._start_export()
                self._enter(name, self._model_spec(), source_hash=self._source.hash)
                continue
            exported = self._start_export().result()
            if isinstance(exported, str):
                self._contest.skip(name, exported)
                continue
            seconds = exported["plain_seconds" if name == EXPORT else "seconds"]
            spec = {"folder": str(self._contest.folder / "export"), "threads": self._threads}
            self._enter(name, spec, prepare_s=seconds)

    def _cannot(self, names: tuple[str, ...], model_bytes: int) -> str:
        """Why these baselines, getting ready at the same time, cannot even be tried; empty when they can."""
        if self._source.reason:
            return self._source.reason
        if self._source.module is not None and names != (EAGER,):
            return "the source is a live module, which only PyTorch eager runs without writing it to files"
        import psutil

        need = int(sum(BASELINES[name].needs for name in names) * model_bytes) + SPARE_BYTES
        free = int(psutil.virtual_memory().available)
        if need > free:
            return f"it needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        return ""

    def _model_spec(self) -> dict[str, Any]:
        found = self._source
        spec = {"source": found.path, "task": self._task, "threads": self._threads}
        return spec if found.layers is None else {**spec, "layers": found.layers}

    def _enter(
        self, name: str, spec: dict[str, Any], source_hash: str | None = None, prepare_s: float | None = None
    ) -> None:
        def seat() -> Seat:
            if self._source.module is not None:
                live = {"source": self._source.module, "sample": str(self._contest.check_inputs)}
                return LocalSeat(make_runner({"kind": name, **spec, **live}))
            return ProcessSeat({"kind": name, **spec}, self._threads)

        baseline = BASELINES[name]
        self._contest.enter(
            name,
            baseline.title,
            seat,
            first_seconds=baseline.first_seconds,
            source_hash=source_hash,
            prepare_s=prepare_s,
        )

    def _start_export(self) -> Future[dict[str, Any] | str]:
        """Export once for both contestants that need it; the value is as :meth:`_export` returns it."""
        if self._exported is None:
            folder = str(self._contest.folder / "export")
            spec = {"kind": EXPORTER, **self._model_spec(), "folder": folder, "cached": self._cached}
            self._exporter = ProcessSeat(spec, self._threads)
            self._exported = self._pool.submit(self._export, self._exporter)
        return self._exported

    def _export(self, seat: Seat) -> dict[str, Any] | str:
        """What the exporter answered, or why it could not export."""
        with self._contest.progress.stage("export with transformers"):
            try:
                return seat.call("load", EXPORT_SECONDS)
            except (NotPossible, Failed, MoeExportError) as error:
                return f"transformers' exporter: {error}"
            finally:
                seat.close()
