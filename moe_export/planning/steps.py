"""Predicted time of one forward pass of a model on a layout of GPUs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moe_export.costs import (
    Assumptions,
    Gpu,
    Popularity,
    Time,
    all_reduce,
    all_to_all,
    predict,
    rank_loads,
    sample_counts,
)
from moe_export.inspect.architecture import Architecture, MoE
from moe_export.inspect.model_costs import (
    EXPERT_LAUNCHES,
    Phase,
    Step,
    active_layers,
    expert_work,
    movement_work,
    shared_kernels,
)
from moe_export.inspect.needs import Workload
from moe_export.planning.layout import Layout
from moe_export.planning.routing import Routing


@dataclass(frozen=True)
class Machine:
    """What is predicted for: a GPU type and the assumptions beside its data sheet."""

    gpu: Gpu
    assumptions: Assumptions


@dataclass(frozen=True)
class Prediction:
    """Predicted time of one pass. ``experts_mean``: seconds the routed experts would take if no rank waited
    for the busiest one; ``exchange_bytes``: sent by one rank.
    """

    time: Time
    parts: dict[str, float] = field(default_factory=dict)
    experts_mean: float = 0.0
    exchange_bytes: float = 0.0

    @property
    def waiting(self) -> float:
        """Seconds that ranks wait, on average, for the one with most expert work."""
        return max(self.parts.get("routed_experts", 0.0) - self.experts_mean, 0.0)

    def times(self, passes: int) -> Prediction:
        """So many passes one after the other."""
        return Prediction(
            self.time * passes,
            {name: seconds * passes for name, seconds in self.parts.items()},
            self.experts_mean * passes,
            self.exchange_bytes * passes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.time.to_dict(),
            "parts_s": dict(self.parts),
            "waiting_s": self.waiting,
            "exchange_bytes_per_rank": self.exchange_bytes,
        }


def predict_step(
    arch: Architecture, layout: Layout, phase: Phase, load: Workload, routing: Routing, machine: Machine
) -> Prediction:
    """One pass of one replica that has its share of ``load.batch`` sequences.

    Decode: one token for each sequence. Prefill: one whole sequence per rank that has any (``alltoall``), or
    one for all ranks of the replica.
    """
    mine = layout.sequences(load.batch)
    own = layout.own_sequences(load.batch) if phase == "decode" else 1
    together = mine
    if phase == "prefill":
        together = min(mine, layout.ranks) if layout.mode == "alltoall" else 1
    split = layout.ranks if layout.mode == "tensor" else 1
    step = Step(phase, own, load.context)
    total = Time()
    parts: defaultdict[str, float] = defaultdict(float)
    for kernels in shared_kernels(arch, step, load.weights, load.cache_bytes, split):
        time = predict(kernels.work, machine.gpu, kernels.compute, machine.assumptions, kernels.launches)
        total += time * kernels.count
        parts[kernels.part] += time.seconds * kernels.count
    tokens = Step(phase, together, load.context).tokens
    mean = sent = 0.0
    for moe, popularity, count in _moe_layers(arch, phase, routing):
        slowest, average, rows = _experts(
            arch, moe, popularity, round(tokens), step, layout, load, routing, machine
        )
        total += slowest * count
        parts["routed_experts"] += slowest.seconds * count
        mean += average * count
        time, size = _exchange(layout, tokens, rows, arch.hidden * load.weights.activation_bytes, machine)
        total += time * count
        sent += size * count
    if layout.mode == "tensor":
        one = all_reduce(
            step.tokens * arch.hidden * load.weights.activation_bytes,
            layout.ranks,
            machine.gpu,
            machine.assumptions,
        )
        blocks = sum((len(layer.attentions) + 1) * n for layer, n in active_layers(arch, phase).items())
        total += one.time * blocks
        sent += one.bytes * blocks
    parts["exchange"] = total.exchange
    return Prediction(total, dict(parts), mean, sent)


def _moe_layers(arch: Architecture, phase: Phase, routing: Routing) -> Iterator[tuple[MoE, Popularity, int]]:
    """MoE layers of a phase with their popularity, alike ones together with their number."""
    popularities = iter(routing.layers)
    found: Counter[tuple[MoE, Popularity]] = Counter()
    for layer in arch.layers:
        if isinstance(layer.ffn, MoE):
            popularity = next(popularities)
            if not arch.encoder_decoder or layer.encoder == (phase == "prefill"):
                found[layer.ffn, popularity] += 1
    for (moe, popularity), count in found.items():
        yield moe, popularity, count


def _experts(
    arch: Architecture,
    moe: MoE,
    popularity: Popularity,
    tokens: int,
    step: Step,
    layout: Layout,
    load: Workload,
    routing: Routing,
    machine: Machine,
) -> tuple[Time, float, float]:
    """Time of the busiest rank, mean of all ranks, rows of the fullest rank; means over drawn batches."""
    import numpy as np

    ranks = layout.ranks
    rows, used = rank_loads(sample_counts(popularity, tokens, routing.samples), ranks)
    per_row = expert_work(moe, 1, 0, load.weights) + movement_work(arch, 0, 1, load.weights)
    per_expert = expert_work(moe, 0, 1, load.weights)
    fixed = movement_work(arch, step.tokens, 0, load.weights)
    gpu, assumptions = machine.gpu, machine.assumptions
    arithmetic = rows * per_row.flops / (gpu.peak(load.weights.compute) * assumptions.compute)
    traffic = (rows * per_row.bytes + used * per_expert.bytes + fixed.bytes) / (
        gpu.bandwidth * assumptions.memory
    )
    seconds = np.maximum(arithmetic, traffic)
    busiest = seconds.argmax(axis=1)
    pick = np.arange(len(seconds)), busiest
    slowest = seconds[pick]
    computing = arithmetic[pick] > traffic[pick]
    overhead = EXPERT_LAUNCHES * assumptions.kernel_s
    share = 1 / len(seconds)
    time = Time(
        memory=float(slowest[~computing].sum()) * share,
        compute=float(slowest[computing].sum()) * share,
        overhead=overhead,
    )
    return time, float(seconds.mean()) + overhead, float(rows.max(axis=1).mean())


def _exchange(layout: Layout, tokens: float, rows: float, width: int, machine: Machine) -> tuple[Time, float]:
    """Exchange of one MoE layer, ``width`` bytes per token: time, and bytes that one rank sends."""
    if layout.mode == "allreduce":
        one = all_reduce(tokens * width, layout.ranks, machine.gpu, machine.assumptions)
        return one.time, one.bytes
    if layout.mode == "alltoall":
        # Blocks of equal size, as large as the fullest rank's share from each rank; there and back.
        one = all_to_all(rows * width, layout.ranks, machine.gpu, machine.assumptions)
        return one.time * 2, one.bytes * 2
    return Time(), 0.0
