"""Running a text engine over a sequence that grows: by KV cache where the graph has one, else by running it
all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import InputError
from moe_export.runtime.cache import CacheBuffers, GrowingCache, SharedCache
from moe_export.runtime.engine import Engine
from moe_export.runtime.inputs import InputChecker, check_sequence
from moe_export.runtime.tensors import numpy_dtype, to_numpy, to_ort
from moe_export.schema import Limits, ModelIO, TensorSpec

Array = NDArray[Any]
Ints = NDArray[np.int64]

LOGITS = "logits"
DECODER_IDS = "decoder_input_ids"
"""An engine with this input is an encoder-decoder."""


class RunsWhole(Protocol):
    """An engine of any kind: all outputs for checked inputs."""

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]: ...


class Stepper(ABC):
    """Feeds new tokens of a batch, step by step. One thread uses it."""

    @abstractmethod
    def feed(self, ids: Ints, mask: Ints) -> dict[str, Array]:
        """Append ``ids`` [batch, new] with ``mask`` [batch, new] (1 token, 0 padding) and run.

        Returns:
            ``logits`` [batch, new, vocab] and the other wanted outputs; valid until the next call.

        Raises:
            InputError: the sequence grew beyond the bundle's maximum.
            BundleError: ONNX Runtime failed.
        """

    def feed_for_last(self, ids: Ints, mask: Ints) -> Array:
        """:meth:`feed`, for the logits of the last token only: [batch, vocab]."""
        last: Array = self.feed(ids, mask)[LOGITS][:, -1]
        return last


class CachedStepper(Stepper):
    """Feeds only the new tokens; the past is in the KV cache.

    What repeats in shape from step to step (ids, positions, logits) is bound once. The mask grows by one
    column per step in memory that is allocated ahead. Python's part of a step was 50 to 80 µs of CPU time
    with 4 cache tensors on a busy 2-core machine, as ``pytest -s tests/runtime/test_overhead.py`` prints it.
    """

    def __init__(
        self, engine: Engine, io: ModelIO, limits: Limits, batch: int, wanted: Sequence[str] = (LOGITS,)
    ) -> None:
        """``wanted``: the outputs :meth:`feed` returns."""
        _refuse_unknown_inputs(io)
        self._engine = engine
        self._limits = limits
        self._batch = batch
        self._binding = engine.binding()
        kind = SharedCache if engine.shared_cache else GrowingCache
        self._cache: CacheBuffers = kind(io.cache_inputs, batch)
        roles: dict[str, TensorSpec] = {spec.role: spec for spec in io.inputs if spec.role != "cache"}
        self._ids, self._mask, self._positions = (roles.get(r) for r in ("token_ids", "mask", "positions"))
        shapes = {spec.name: spec.shape for spec in io.outputs}
        self._wanted = tuple(wanted)
        self._growing = [n for n in wanted if n not in shapes or {"past", "total"} & set(shapes[n])]
        self._steady = [n for n in wanted if n not in self._growing]
        self._bound_order: list[str] = []
        self._past = 0
        self._new = 0
        self._counts = np.zeros((batch, 1), np.int64)
        self._history = np.zeros((batch, 64), numpy_dtype(self._mask.dtype if self._mask else "int64"))
        self._ids_buffer: Array = self._counts
        self._positions_buffer: Array = self._counts

    def feed(self, ids: Ints, mask: Ints) -> dict[str, Array]:
        check_step(ids, mask, self._batch)
        new = ids.shape[1]
        if self._engine.rows_apart and self._batch > 1 and new > 1 and self._past:
            return self._feed_one_by_one(ids, mask)
        total = self._past + new
        check_sequence(total, self._past, self._limits)
        if new != self._new:
            self._allocate(new)
        self._ids_buffer[...] = ids
        if self._mask is not None:
            self._bind_mask(self._mask, mask, total)
        if self._positions is not None:
            counts = self._counts + (mask if new == 1 else np.cumsum(mask, axis=1))
            self._positions_buffer[...] = np.maximum(counts - 1, 0)
            self._counts = counts[:, -1:]
        self._cache.reserve(total)
        self._cache.bind(self._binding)
        for name in self._growing:
            self._binding.bind_output(name)
        self._engine.run_bound(self._binding)
        if not self._bound_order:
            # ONNX Runtime lists outputs in the order of their first binding.
            self._bound_order = [*self._steady, *self._cache.outputs, *self._growing]
        results = dict(zip(self._bound_order, self._binding.get_outputs(), strict=True))
        self._cache.advance(results)
        self._past = total
        return {name: to_numpy(results[name]) for name in self._wanted}

    def _feed_one_by_one(self, ids: Ints, mask: Ints) -> dict[str, Array]:
        """The same as one step of several tokens, for engines that take several only for one sequence."""
        new = ids.shape[1]
        check_sequence(self._past + new, self._past, self._limits)
        steps = []
        for column in range(new):
            part = slice(column, column + 1)
            results = self.feed(ids[:, part], mask[:, part])
            steps.append({name: array.copy() for name, array in results.items()})
        joined = {}
        for name in self._wanted:
            if name == LOGITS:
                joined[name] = np.concatenate([step[name] for step in steps], axis=1)
            else:
                # Traces are [batch * new, ...]: batch first, then the tokens.
                stacked = np.stack([step[name] for step in steps], axis=1)
                joined[name] = stacked.reshape(-1, *stacked.shape[2:])
        return joined

    def _allocate(self, new: int) -> None:
        """Bind ids, positions and logits for ``new`` tokens per step; good until the number changes."""
        shape = (self._batch, new)
        if self._ids is not None:
            self._ids_buffer = np.zeros(shape, numpy_dtype(self._ids.dtype))
            self._binding.bind_ortvalue_input(self._ids.name, to_ort(self._ids_buffer))
        if self._positions is not None:
            self._positions_buffer = np.zeros(shape, numpy_dtype(self._positions.dtype))
            self._binding.bind_ortvalue_input(self._positions.name, to_ort(self._positions_buffer))
        for name in self._steady:
            self._binding.bind_output(name)
        self._new = new

    def _bind_mask(self, spec: TensorSpec, mask: Ints, total: int) -> None:
        if total > self._history.shape[1]:
            grown = np.zeros((self._batch, 2 * total), self._history.dtype)
            grown[:, : self._past] = self._history[:, : self._past]
            self._history = grown
        self._history[:, self._past : total] = mask
        # For a batch of one this is a view, else a copy of the mask.
        self._binding.bind_ortvalue_input(spec.name, to_ort(np.ascontiguousarray(self._history[:, :total])))


class ReplayStepper(Stepper):
    """For a decoder without KV cache: runs the whole sequence at every step."""

    def __init__(self, engine: RunsWhole, io: ModelIO, checker: InputChecker) -> None:
        _refuse_unknown_inputs(io)
        self._engine = engine
        self._checker = checker
        self._ids_name = next(spec.name for spec in io.inputs if spec.role == "token_ids")
        self._mask_name = next((spec.name for spec in io.inputs if spec.role == "mask"), None)
        self._ids: Ints | None = None
        self._mask: Ints | None = None

    def feed(self, ids: Ints, mask: Ints) -> dict[str, Array]:
        self._ids = ids if self._ids is None else np.concatenate([self._ids, ids], axis=1)
        self._mask = mask if self._mask is None else np.concatenate([self._mask, mask], axis=1)
        inputs = {self._ids_name: self._ids}
        if self._mask_name is not None:
            inputs[self._mask_name] = self._mask
        outputs = self._engine.run(self._checker.check(inputs).feeds)
        return {LOGITS: outputs[LOGITS][:, -ids.shape[1] :]}


class EncoderDecoderStepper(Stepper):
    """For an encoder-decoder: the source is fixed, the target grows and is run whole at every step."""

    def __init__(self, engine: RunsWhole, checker: InputChecker, source: dict[str, Ints]) -> None:
        """``source``: the encoder's inputs by name, ``input_ids`` and ``attention_mask``."""
        self._engine = engine
        self._checker = checker
        self._source = source
        self._target: Ints | None = None

    def feed(self, ids: Ints, mask: Ints) -> dict[str, Array]:
        self._target = ids if self._target is None else np.concatenate([self._target, ids], axis=1)
        inputs = {**self._source, DECODER_IDS: self._target}
        outputs = self._engine.run(self._checker.check(inputs).feeds)
        return {LOGITS: outputs[LOGITS][:, -ids.shape[1] :]}


def check_step(ids: Ints, mask: Ints, batch: int) -> None:
    """Raise :class:`InputError` where a step's ``ids`` and ``mask`` are not both [``batch``, new tokens]."""
    shape = ids.shape
    if len(shape) != 2 or shape[0] != batch or not shape[1] or mask.shape != shape:
        raise InputError(
            f"a step's ids have shape {list(shape)} and its mask {list(mask.shape)}; expected both [{batch}, "
            "new tokens]"
        )


def _refuse_unknown_inputs(io: ModelIO) -> None:
    for spec in io.inputs:
        text = spec.role in ("token_ids", "cache")
        counted = spec.role in ("mask", "positions") and len(spec.shape) == 2 or spec.role == "capacity"
        if not text and not counted:
            raise InputError(
                f"generation cannot supply the input {spec.name!r} ({spec.role}); call run() with all inputs"
            )
