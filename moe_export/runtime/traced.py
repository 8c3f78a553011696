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
        if routing is not None:
            instrument.check_routing(self._layers, routing)
        engine, dtypes = self._engine(forced=routing is not None)
        forced = {} if routing is None else instrument.forced_feeds(self._layers, routing, dtypes)
        outputs = engine.run({**feeds, **forced})
        traces = instrument.layer_traces(self._layers, {**outputs, **forced})
        return TracedRun({spec.name: outputs[spec.name] for spec in self._io.outputs}, traces)

    def run_chunked(
        self, ids: Ints, mask: Ints, chunks: Sequence[int], check_open: Callable[[], None]
    ) -> TracedRun:
        """Feed ``ids`` [batch, sequence] through the KV cache in pieces of the lengths ``chunks``."""
        if any(type(size) is not int or size < 1 for size in chunks) or sum(chunks) != ids.shape[1]:
            raise InputError(
                f"chunks {list(chunks)}: expected whole numbers of 1 or more that sum to the sequence length "
                f"{ids.shape[1]}"
            )
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
        logits = joined.pop(LOGITS)
        rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in joined.items()}
        return TracedRun({LOGITS: logits}, instrument.layer_traces(self._layers, rows))

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
