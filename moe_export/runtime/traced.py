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


SHOWN, FORCED, BARE = "shown", "forced", "bare"
"""Forms of a model: its layers' values are outputs; routing values are inputs, too; routing values are
inputs, and outputs are the model's own, with the speed of the plain engine."""


class TracedEngines:
    """The instrumented forms of one model. Each is loaded once, on first use."""

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
        self._loaded: dict[str, tuple[Engine, dict[str, np.dtype[Any]]]] = {}

    def run(self, feeds: dict[str, Array], routing: Sequence[LayerTrace] | None) -> TracedRun:
        """Run once with checked inputs; ``routing`` replaces what the routers choose.

        Raises:
            InputError: ``routing`` does not fit the model.
            BundleError: the model cannot be instrumented, or ONNX Runtime failed.
        """
        forced = self.forced_feeds(routing)
        form = SHOWN if routing is None else FORCED
        return self.finished(self.outputs({**feeds, **forced}, form), forced)

    def run_forced(
        self, feeds: dict[str, Array], routing: Sequence[tuple[Array, Array]]
    ) -> dict[str, Array]:
        """The model's outputs, with ids and weights per layer in place of what the routers choose."""
        return self.outputs({**feeds, **self.bare_feeds(routing)}, BARE)

    def run_chunked(
        self, ids: Ints, mask: Ints, chunks: Sequence[int], check_open: Callable[[], None]
    ) -> TracedRun:
        """Feed ``ids`` [batch, sequence] through the KV cache in pieces of the lengths ``chunks``."""
        check_chunks(chunks, ids.shape[1])
        return self.finished_chunked(self.chunked_outputs(ids, mask, chunks, check_open))

    def prepare(self, form: str) -> None:
        """Load a form of the model."""
        self._engine(form)

    def forced_feeds(self, routing: Sequence[LayerTrace] | None) -> dict[str, Array]:
        """``routing`` as inputs of the form that takes it.

        Raises:
            InputError: ``routing`` does not fit the model.
        """
        self.check_routing(routing)
        if routing is None:
            return {}
        _, dtypes = self._engine(FORCED)
        return instrument.forced_feeds(self._layers, routing, dtypes)

    def bare_feeds(self, routing: Sequence[tuple[Array, Array]]) -> dict[str, Array]:
        """Ids and weights per layer as inputs of the bare form.

        Raises:
            InputError: there are not as many as the model has MoE layers.
        """
        if len(routing) != len(self._layers):
            raise InputError(f"routing of {len(routing)} layers; the bundle has {len(self._layers)}")
        _, dtypes = self._engine(BARE)
        named = {
            name: array
            for layer, pair in zip(self._layers, routing, strict=True)
            for name, array in zip((layer.expert_ids, layer.weights), pair, strict=True)
        }
        return {name: np.ascontiguousarray(array, dtypes[name]) for name, array in named.items()}

    def check_routing(self, routing: Sequence[LayerTrace] | None) -> None:
        """Raise :class:`InputError` where ``routing`` does not fit the model."""
        if routing is not None:
            instrument.check_routing(self._layers, routing)

    def outputs(self, feeds: dict[str, Array], form: str) -> dict[str, Array]:
        """What a form of the model gives; ``feeds`` hold the routing where it takes it."""
        engine, _ = self._engine(form)
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
        engine, _ = self._engine(SHOWN)
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

    def _engine(self, form: str) -> tuple[Engine, dict[str, np.dtype[Any]]]:
        """The engine of a form, and the dtypes of its inputs."""
        if not self._layers and form == SHOWN:
            return self._plain, {}
        with self._lock:
            if form not in self._loaded:
                self._loaded[form] = self._load(form)
            return self._loaded[form]

    def _load(self, form: str) -> tuple[Engine, dict[str, np.dtype[Any]]]:
        model = instrument.traced_model(
            self._path, self._layers, force_routing=form != SHOWN, show=form != BARE
        )
        label = f"{self._path} with its routing {'shown' if form == SHOWN else 'forced'}"
        session = create_session(
            model,
            threads=self._threads,
            folder=self._path.parent,
            prepack=form == BARE,
            label=label,
            plugin=self._plugin,
        )
        dtypes = {value.name: instrument.dtype_of(value.type) for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        plain = self._plain
        engine = Engine(
            session, label, outputs, shared_cache=plain.shared_cache, rows_apart=plain.rows_apart
        )
        return engine, dtypes


def check_chunks(chunks: Sequence[int], length: int) -> None:
    """Raise :class:`InputError` where ``chunks`` are no pieces of a sequence of ``length`` tokens."""
    if any(type(size) is not int or size < 1 for size in chunks) or sum(chunks) != length:
        raise InputError(
            f"chunks {list(chunks)}: expected whole numbers of 1 or more that sum to the sequence length "
            f"{length}"
        )
