"""An engine of any kind that is ready to run: what a session works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_export.backends.onnxruntime.runner import create_session
from moe_export.bundle.reader import Bundle
from moe_export.runtime.capacity import CapacityUse
from moe_export.runtime.engine import Engine, check_declared
from moe_export.runtime.gpu import GpuStepper, NoTraces, open_gpu_engine
from moe_export.runtime.gpu_ranks import SetCommunicator
from moe_export.runtime.plugin import runs_with_plugin
from moe_export.runtime.stepping import CachedStepper, RunsWhole, Stepper
from moe_export.runtime.traced import TracedEngines
from moe_export.sms import GPU_TARGETS
from moe_export.trace import LayerTrace, TracedRun

Ints = NDArray[np.int64]


class ShowsRouting(Protocol):
    """Runs that show routing, or take it; see :class:`~moe_export.runtime.traced.TracedEngines`."""

    def run(
        self, feeds: dict[str, NDArray[Any]], routing: Sequence[LayerTrace] | None
    ) -> TracedRun: ...

    def run_forced(
        self, feeds: dict[str, NDArray[Any]], routing: Sequence[tuple[NDArray[Any], NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]: ...

    def run_chunked(
        self, ids: Ints, mask: Ints, chunks: Sequence[int], check_open: Callable[[], None]
    ) -> TracedRun: ...


@dataclass(frozen=True)
class Opened:
    """``stepper``: a new KV-cached stepper for so many sequences; only for engines with a cache.
    ``capacity_use``: see :attr:`Session.capacity_use`. ``close``: frees what is not freed by itself.
    ``set_communicator``: of an engine that exchanges through NCCL; None: of another."""

    engine: RunsWhole
    traced: ShowsRouting
    stepper: Callable[[int], Stepper]
    capacity_use: Callable[[], CapacityUse | None]
    close: Callable[[], None]
    set_communicator: SetCommunicator | None = None


def open_engine(bundle: Bundle, threads: int | None) -> Opened:
    """The engine of a bundle in this process."""
    manifest = bundle.manifest
    if manifest.target in GPU_TARGETS:
        gpu = open_gpu_engine(bundle)
        return Opened(
            gpu,
            NoTraces(),
            lambda batch: GpuStepper(gpu, manifest.io.inputs, manifest.limits, batch),
            lambda: gpu.capacity_use,
            gpu.close,
            gpu.set_communicator,
        )
    model = bundle.model_path
    session = create_session(model, threads=threads, plugin=runs_with_plugin(manifest))
    check_declared(session, manifest.io, str(model))
    plain = Engine(
        session,
        str(model),
        [spec.name for spec in manifest.io.outputs],
        shared_cache=manifest.cache == "shared",
        rows_apart=manifest.rows_apart,
    )
    return Opened(
        plain,
        TracedEngines(plain, model, manifest, threads),
        lambda batch: CachedStepper(plain, manifest.io, manifest.limits, batch),
        lambda: None,
        _nothing,
    )


def _nothing() -> None:
    return None
