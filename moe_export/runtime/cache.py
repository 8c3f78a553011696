"""The KV cache of one generation: which value each cache input reads, and where each cache output goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_export.runtime.tensors import numpy_dtype, to_numpy, to_ort
from moe_export.schema import TensorSpec

if TYPE_CHECKING:
    import onnxruntime as ort


class CacheBuffers(ABC):
    """Cache tensors of one running sequence batch. Before each run :meth:`bind`, after it :meth:`advance`.

    The generation loop knows only this interface; a graph that updates its cache in place gets another form
    of it.
    """

    @property
    @abstractmethod
    def outputs(self) -> Sequence[str]:
        """Names of the cache outputs that :meth:`bind` binds."""

    def reserve(self, total: int) -> None:
        """Before :meth:`bind`: the next run makes the sequence ``total`` tokens long."""
        return None

    @abstractmethod
    def bind(self, binding: ort.IOBinding) -> None:
        """Bind every cache input and cache output for the next run."""

    @abstractmethod
    def advance(self, results: Mapping[str, ort.OrtValue]) -> None:
        """Take over the cache outputs (by name) of the run that has ended."""


class GrowingCache(CacheBuffers):
    """For graphs that write ``present`` as a new tensor (``past`` and new entries concatenated, or a new
    state).

    ONNX Runtime allocates each output from its arena, and the same value is bound as the next run's input: no
    byte passes through Python, and beyond what the graph itself writes nothing is copied.
    """

    def __init__(self, specs: Sequence[TensorSpec], batch: int) -> None:
        """``specs``: the cache inputs, each with its ``pair``. They start with a past of 0, states with
        zeros.
        """
        self._names = [(spec.name, str(spec.pair)) for spec in specs]
        sizes = {"batch": batch, "past": 0}
        self._values = [
            to_ort(
                np.zeros([d if isinstance(d, int) else sizes[d] for d in spec.shape], numpy_dtype(spec.dtype))
            )
            for spec in specs
        ]

    @property
    def outputs(self) -> Sequence[str]:
        return [output for _, output in self._names]

    def bind(self, binding: ort.IOBinding) -> None:
        for (name, output), value in zip(self._names, self._values, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_output(output)

    def advance(self, results: Mapping[str, ort.OrtValue]) -> None:
        self._values = [results[output] for _, output in self._names]


class SharedCache(CacheBuffers):
    """For graphs that append to the cache where it lies: each cache input and its output are one buffer.

    The buffer has room for more tokens than there are; when it is full it is doubled, which copies it once.
    A step copies nothing.
    """

    def __init__(self, specs: Sequence[TensorSpec], batch: int, room: int = 64) -> None:
        """``specs``: the cache inputs, each with ``pair`` and a ``past`` axis. ``room``: tokens at first."""
        self._specs = [(spec, str(spec.pair), spec.shape.index("past")) for spec in specs]
        self._batch = batch
        self._room = room
        self._values = [to_ort(self._zeros(spec)) for spec, _, _ in self._specs]

    def _zeros(self, spec: TensorSpec) -> NDArray[Any]:
        sizes = {"batch": self._batch, "past": self._room}
        return np.zeros([d if isinstance(d, int) else sizes[d] for d in spec.shape], numpy_dtype(spec.dtype))

    @property
    def outputs(self) -> Sequence[str]:
        return [output for _, output, _ in self._specs]

    def reserve(self, total: int) -> None:
        if total <= self._room:
            return
        before, self._room = self._room, max(total, 2 * self._room)
        for index, (spec, _, axis) in enumerate(self._specs):
            grown = self._zeros(spec)
            grown[(slice(None),) * axis + (slice(before),)] = to_numpy(self._values[index])
            self._values[index] = to_ort(grown)

    def bind(self, binding: ort.IOBinding) -> None:
        for (spec, output, _), value in zip(self._specs, self._values, strict=True):
            binding.bind_ortvalue_input(spec.name, value)
            binding.bind_ortvalue_output(output, value)

    def advance(self, results: Mapping[str, ort.OrtValue]) -> None:
        return None
