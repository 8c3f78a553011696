"""Runs that show the routing of every MoE layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.backends.onnxruntime.runner import create_session
from moe_export.errors import InputError
from moe_export.runtime import instrument
from moe_export.runtime.engine import Engine
from moe_export.runtime.plugin import runs_with_plugin
from moe_export.runtime.stepping import LOGITS, CachedStepper
from moe_export.schema import Limits, Manifest
from moe_export.trace import LayerTrace, TracedRun

Array = NDArray[Any]
Ints = NDArray[np.int64]


class TracedEngines:
    """The instrumented forms of one model, routing shown or forced. Each is loaded once, on first use."""

    def __init__(self, plain: Engine, model_path: Path, manifest: Manifest, threads: int | None) -> None:
        """``plain``: the engine as it is, which serves where a model has no MoE layer."""
        self._plain = plain
        self._path = model_path
        self._io = manifest.io
        self._layers = manifest.moe_layers
        self._limits: Limits = manifest.limits
        self._threads = threads
        self._plugin = runs_with_plugin(manifest)
        self._lock = threading.Lock()
        self._loaded: dict[bool, tuple[Engine, dict[str, np.dtype[Any]]]] = {}

    def run(self, feeds: dict[str, Array], routing: Sequence[LayerTrace] | None) -> TracedRun:
        """Run once with checked inputs; ``routing`` replaces what the routers choose.

        Raises:
            InputError: ``routing`` does not fit the model.
            BundleError: the model cannot be instrumented, or ONNX Runtime failed.
        """
        forced = self.forced_feeds(routing)
        return self.finished(self.outputs({**feeds, **forced}, forced=routing is not None), forced)

    def run_chunked(
        self, ids: Ints, mask: Ints, chunks: Sequence[int], check_open: Callable[[], None]
    ) -> TracedRun:
        """Feed ``ids`` [batch, sequence] through the KV cache in pieces of the lengths ``chunks``."""
        check_chunks(chunks, ids.shape[1])
        return self.finished_chunked(self.chunked_outputs(ids, mask, chunks, check_open))

    def prepare(self, *, forced: bool) -> None:
        """Load the form of the model that shows routing, or (``forced``) takes it."""
        self._engine(forced=forced)

    def forced_feeds(self, routing: Sequence[LayerTrace] | None) -> dict[str, Array]:
        """``routing`` as inputs of the form that takes it.

        Raises:
            InputError: ``routing`` does not fit the model.
        """
        self.check_routing(routing)
        if routing is None:
            return {}
        _, dtypes = self._engine(forced=True)
        return instrument.forced_feeds(self._layers, routing, dtypes)

    def check_routing(self, routing: Sequence[LayerTrace] | None) -> None:
        """Raise :class:`InputError` where ``routing`` does not fit the model."""
        if routing is not None:
            instrument.check_routing(self._layers, routing)

    def outputs(self, feeds: dict[str, Array], *, forced: bool) -> dict[str, Array]:
        """Outputs and the layers' values of one run; ``feeds`` hold the routing where it is ``forced``."""
        engine, _ = self._engine(forced=forced)
        return engine.run(feeds)

    def finished(self, outputs: dict[str, Array], forced: dict[str, Array]) -> TracedRun:
        """What :meth:`outputs` gave, with the routing that was forced on it."""
        traces = instrument.layer_traces(self._layers, {**outputs, **forced})
        return TracedRun({spec.name: outputs[spec.name] for spec in self._io.outputs}, traces)

    def chunked_outputs(
        self, ids: Ints, mask: Ints, chunks: Sequence[int], check_open: Callable[[], None]
    ) -> dict[str, Array]:
        """Logits [batch, sequence, vocab], and the layers' values [batch * sequence, ...]."""
        wanted = [LOGITS, *instrument.traced_values(self._layers)]
        engine, _ = self._engine(forced=False)
        stepper = CachedStepper(engine, self._io, self._limits, len(ids), wanted)
        pieces: dict[str, list[Array]] = {name: [] for name in wanted}
        start = 0
        for size in chunks:
            check_open()
            results = stepper.feed(ids[:, start : start + size], mask[:, start : start + size])
            start += size
            for name, array in results.items():
                # Traces are [batch * chunk, ...]. Copied, since the next step may reuse the memory.
                rest = array.shape[2:] if name == LOGITS else array.shape[1:]
                pieces[name].append(array.reshape(len(ids), size, *rest).copy())
        joined = {name: np.concatenate(parts, axis=1) for name, parts in pieces.items()}
        return {
            name: array if name == LOGITS else array.reshape(-1, *array.shape[2:])
            for name, array in joined.items()
        }

    def finished_chunked(self, outputs: dict[str, Array]) -> TracedRun:
        """What :meth:`chunked_outputs` gave."""
        return TracedRun({LOGITS: outputs[LOGITS]}, instrument.layer_traces(self._layers, outputs))

    def _engine(self, *, forced: bool) -> tuple[Engine, dict[str, np.dtype[Any]]]:
        """The engine and the dtypes of its inputs."""
        if not self._layers and not forced:
            return self._plain, {}
        with self._lock:
            if forced not in self._loaded:
                model = instrument.traced_model(self._path, self._layers, force_routing=forced)
                label = f"{self._path} with its routing {'forced' if forced else 'shown'}"
                session = create_session(
                    model,
                    threads=self._threads,
                    folder=self._path.parent,
                    prepack=False,
                    label=label,
                    plugin=self._plugin,
                )
                dtypes = {value.name: instrument.dtype_of(value.type) for value in session.get_inputs()}
                outputs = [value.name for value in session.get_outputs()]
                engine = Engine(
                    session,
                    label,
                    outputs,
                    shared_cache=self._plain.shared_cache,
                    rows_apart=self._plain.rows_apart,
                )
                self._loaded[forced] = engine, dtypes
            return self._loaded[forced]


def check_chunks(chunks: Sequence[int], length: int) -> None:
    """Raise :class:`InputError` where ``chunks`` are no pieces of a sequence of ``length`` tokens."""
    if any(type(size) is not int or size < 1 for size in chunks) or sum(chunks) != length:
        raise InputError(
            f"chunks {list(chunks)}: expected whole numbers of 1 or more that sum to the sequence length "
            f"{length}"
        )
