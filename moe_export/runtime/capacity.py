"""Engines whose experts work in buckets: how large to make them, and running again when one was too small.

The host gives the capacity (rows per expert's bucket) and gets back the load (tokens of the fullest expert).
A load above the capacity voids the run: some assignments found no place. The runner on a GPU and the
simulation on a CPU both run through :class:`CapacityRunner`, so what is simulated is what runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_export.costs.buckets import first_guess, round_up, uniform_load
from moe_export.errors import InputError
from moe_export.schema import Manifest, ModelIO, MoELayer, TensorSpec

Result = TypeVar("Result")

_HOST_ROLES = ("capacity", "load")


def own_io(io: ModelIO) -> ModelIO:
    """The model's inputs and outputs without those that the host answers for itself."""
    return ModelIO(
        tuple(spec for spec in io.inputs if spec.role not in _HOST_ROLES),
        tuple(spec for spec in io.outputs if spec.role not in _HOST_ROLES),
    )


@dataclass(frozen=True)
class BucketIO:
    """The input whose length is the capacity, and the output that holds the load of each layer."""

    capacity: TensorSpec
    load: TensorSpec


def bucket_io(io: ModelIO) -> BucketIO | None:
    """What an engine has for its buckets; None where it has none."""
    capacity = next((spec for spec in io.inputs if spec.role == "capacity"), None)
    load = next((spec for spec in io.outputs if spec.role == "load"), None)
    return None if capacity is None or load is None else BucketIO(capacity, load)


def count_tokens(io: ModelIO, shapes: Mapping[str, Sequence[int]]) -> int:
    """Tokens of a run whose inputs have ``shapes``: a guess where the engine takes no token ids."""
    counts = [1]
    for spec in own_io(io).inputs:
        shape = tuple(shapes.get(spec.name, ()))
        if spec.role == "token_ids":
            counts.append(_product(shape))
        elif spec.role == "data":
            counts.append(_product(shape[:-1]))
    return max(counts)


def _product(numbers: Sequence[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


@dataclass(frozen=True)
class CapacityUse:
    """How the buckets of an engine went. ``reruns``: how often a run was done again, which may be several
    times for one run."""

    runs: int = 0
    reruns: int = 0
    largest_load: int = 0
    largest_capacity: int = 0

    def text(self) -> str:
        """One line for reports."""
        if not self.runs:
            return "no run used buckets"
        return (
            f"{self.runs} runs, and {self.reruns} re-runs with larger buckets; the fullest expert got "
            f"{self.largest_load} tokens, the largest bucket held {self.largest_capacity}"
        )


class CapacityRunner:
    """Chooses capacities, learns from loads, counts. Thread-safe.

    ``largest``: the capacity the engine was built for; None = any.
    """

    def __init__(self, layers: Sequence[MoELayer], largest: int | None = None) -> None:
        self._kinds = sorted({(layer.top_k, layer.num_experts) for layer in layers}) or [(1, 1)]
        self._largest = largest
        self._skew = 0.0
        self._lock = threading.Lock()
        self._use = CapacityUse()

    @classmethod
    def of(cls, manifest: Manifest) -> CapacityRunner:
        """For an engine with the manifest's layers and limits: a bucket for all its tokens is its largest."""
        limits = manifest.limits
        if limits.max_batch is None or limits.max_sequence is None:
            return cls(manifest.moe_layers)
        senders = manifest.expert_parallel.senders if manifest.expert_parallel is not None else 1
        # A rank without a sequence of its own repeats one.
        batch = -(-limits.max_batch // senders) * senders
        return cls(manifest.moe_layers, batch * limits.max_sequence)

    @property
    def use(self) -> CapacityUse:
        """What happened so far."""
        return self._use

    def guess(self, tokens: int) -> int:
        """Rows per bucket to begin with: what uniform choice and the skew seen so far ask for."""
        rows = max(first_guess(tokens, top_k, experts) for top_k, experts in self._kinds)
        if self._skew:
            seen = self._skew * self._uniform(tokens)
            rows = round_up(1.1 * seen, max(tokens, 1))
        return min(rows, self._largest) if self._largest is not None else rows

    def run(self, tokens: int, execute: Callable[[int], tuple[Result, int]]) -> Result:
        """The result of ``execute(capacity)``, which also returns the load, with enough capacity.

        Args:
            tokens: of this run; decides the first capacity only.
            execute: runs the engine. It must leave its inputs as they are, since it may run again.

        Raises:
            InputError: an expert gets more tokens than the engine's largest bucket holds.
        """
        capacity = self.guess(tokens)
        while True:
            result, load = execute(capacity)
            void = load > capacity
            self._note(tokens, load, capacity, void)
            if not void:
                return result
            if self._largest is not None and load > self._largest:
                raise InputError(
                    f"{load} tokens chose one expert, and this engine's largest bucket holds "
                    f"{self._largest}; "
                    f"send at most {self._largest} tokens at once (they always fit)"
                )
            # Layers behind an overflow saw void values: their loads may still grow.
            capacity = round_up(load, self._largest or max(tokens, load))

    def _uniform(self, tokens: int) -> float:
        return max(uniform_load(tokens, top_k, experts) for top_k, experts in self._kinds)

    def _note(self, tokens: int, load: int, capacity: int, void: bool) -> None:
        with self._lock:
            use = self._use
            self._use = CapacityUse(
                use.runs + (not void),
                use.reruns + void,
                max(use.largest_load, load),
                max(use.largest_capacity, capacity),
            )
            if void and tokens:
                self._skew = max(self._skew, load / self._uniform(tokens))


def load_of(array: Any) -> int:
    """The largest of an engine's loads (int32 [layers], in main memory)."""
    return int(array.max(initial=0))
