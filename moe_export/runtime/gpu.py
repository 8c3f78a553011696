"""Engines on a GPU: whole runs, and steps of generation whose KV cache stays there. *Not run on a GPU.*"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_export.backends.trt.choice import usable_engine
from moe_export.backends.trt.device import DeviceArray
from moe_export.backends.trt.nccl import Nccl
from moe_export.backends.trt.runner import PlanRunner
from moe_export.bundle.reader import Bundle
from moe_export.errors import InputError
from moe_export.runtime.capacity import (
    CapacityRunner,
    CapacityUse,
    bucket_io,
    count_tokens,
    load_of,
    own_io,
)
from moe_export.runtime.inputs import check_sequence
from moe_export.runtime.stepping import LOGITS, Stepper
from moe_export.runtime.tensors import numpy_dtype
from moe_export.schema import Limits, Manifest, TensorSpec
from moe_export.trace import LayerTrace, TracedRun

Array = NDArray[Any]
Ints = NDArray[np.int64]


class Runner(Protocol):
    """What runs a plan: :class:`~moe_export.backends.trt.runner.PlanRunner`."""

    def to_device(self, name: str, array: Any) -> DeviceArray: ...

    def to_host(self, array: DeviceArray) -> Array: ...

    def run(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]: ...

    def set_communicator(self, nccl: Nccl, address: int) -> None: ...

    def close(self) -> None: ...


def open_gpu_engine(bundle: Bundle) -> GpuEngine:
    """The plan of a bundle (of several ranks: of the bundle's rank) that fits the GPU here.

    Raises:
        EnvironmentLacksError: no GPU, driver or library that runs it. BundleError: no plan, or one of another
        version.
    """
    engine = usable_engine(bundle.rank_manifest, str(bundle.path))
    io, parallel = bundle.manifest.io, bundle.manifest.expert_parallel
    dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in (*io.inputs, *io.outputs)}
    ranks = 1 if parallel is None else parallel.ranks
    return GpuEngine(bundle.manifest, PlanRunner(bundle.path / engine.file, engine, io, dtypes, ranks))


class GpuEngine:
    """Runs a plan, with buckets as large as its tokens need.

    Plans of several ranks give one load, the largest of all, so that all ranks run again or none does.
    """

    shared_cache = False
    rows_apart = False

    def __init__(self, manifest: Manifest, runner: Runner) -> None:
        io, parallel = manifest.io, manifest.expert_parallel
        self._runner = runner
        self._senders = 1 if parallel is None else parallel.senders
        self._io = io
        self._buckets = bucket_io(io)
        self._capacities = CapacityRunner.of(manifest)
        self.outputs = tuple(spec.name for spec in own_io(io).outputs)

    @property
    def capacity_use(self) -> CapacityUse | None:
        """How often buckets were too small; None for a plan without them."""
        return None if self._buckets is None else self._capacities.use

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for checked inputs, in main memory."""
        held = {name: self.put(name, array) for name, array in feeds.items()}
        results = self.run_on_device(held)
        return {name: self.take(results[name]) for name in self.outputs}

    def run_on_device(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """All outputs for inputs on the GPU. Runs again with more room per expert until every token fits."""
        buckets = self._buckets
        if buckets is None:
            return self._runner.run(inputs)
        name, output = buckets.capacity.name, buckets.load.name

        def execute(capacity: int) -> tuple[dict[str, DeviceArray], int]:
            marker = self.put(name, np.zeros(capacity, np.int32))
            results = self._runner.run({**inputs, name: marker})
            return results, load_of(self.take(results[output]))

        shapes = {key: array.shape for key, array in inputs.items()}
        # To a rank's experts all senders send, each as many tokens as there are here.
        return self._capacities.run(count_tokens(self._io, shapes) * self._senders, execute)

    def set_communicator(self, nccl: Nccl, address: int) -> None:
        """Let the plan exchange with those of other ranks. See :meth:`PlanRunner.set_communicator`."""
        self._runner.set_communicator(nccl, address)

    def close(self) -> None:
        """Leave the other ranks."""
        self._runner.close()

    def put(self, name: str, array: Any) -> DeviceArray:
        """An input's value on the GPU."""
        return self._runner.to_device(name, array)

    def take(self, array: DeviceArray) -> Array:
        """A copy in main memory."""
        return self._runner.to_host(array)

    def zeros(self, spec: TensorSpec, sizes: Mapping[str, int]) -> DeviceArray:
        """A cache input of zeros; free dimensions by name."""
        shape = [d if isinstance(d, int) else sizes[d] for d in spec.shape]
        return self.put(spec.name, np.zeros(shape, numpy_dtype(spec.dtype)))


class GpuStepper(Stepper):
    """Feeds only the new tokens; past keys and values stay on the GPU, and the outputs of one step are the
    inputs of the next."""

    def __init__(self, engine: GpuEngine, inputs: Sequence[TensorSpec], limits: Limits, batch: int) -> None:
        self._engine = engine
        self._limits = limits
        self._cache = [spec for spec in inputs if spec.role == "cache"]
        self._names = {spec.role: spec.name for spec in inputs if spec.role != "cache"}
        self._past = 0
        self._counts = np.zeros((batch, 1), np.int64)
        self._history = np.zeros((batch, 0), np.int64)
        sizes = {"batch": batch, "past": 0}
        self._held = {spec.name: engine.zeros(spec, sizes) for spec in self._cache}

    def feed(self, ids: Ints, mask: Ints) -> dict[str, Array]:
        total = self._past + ids.shape[1]
        check_sequence(total, self._past, self._limits)
        self._history = np.concatenate([self._history, mask], axis=1)
        counts = self._counts + np.cumsum(mask, axis=1)
        host: dict[str, Array] = {self._names["token_ids"]: ids}
        if "mask" in self._names:
            host[self._names["mask"]] = self._history
        if "positions" in self._names:
            host[self._names["positions"]] = np.maximum(counts - 1, 0)
        held = {name: self._engine.put(name, array) for name, array in host.items()}
        results = self._engine.run_on_device({**self._held, **held})
        self._held = {spec.name: results[str(spec.pair)] for spec in self._cache}
        self._counts = counts[:, -1:]
        self._past = total
        return {LOGITS: self._engine.take(results[LOGITS])}


class NoTraces:
    """In the place of traced engines: a plan shows its outputs only."""

    def run(self, feeds: dict[str, Array], routing: Sequence[LayerTrace] | None) -> TracedRun:
        """Refused."""
        _no_traces()

    def run_forced(
        self, feeds: dict[str, Array], routing: Sequence[tuple[Array, Array]]
    ) -> dict[str, Array]:
        """Refused."""
        _no_traces()

    def run_chunked(
        self, ids: Ints, mask: Ints, chunks: Sequence[int], check_open: Callable[[], None]
    ) -> TracedRun:
        """Refused."""
        _no_traces()


def _no_traces() -> NoReturn:
    raise InputError(
        "a TensorRT plan shows its outputs only, not the routing inside; `moe-export verify BUNDLE "
        "--simulate` shows it "
        "on the CPU"
    )
