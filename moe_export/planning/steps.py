"""Predicted time of one forward pass of a model on a layout of GPUs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moe_export.costs import (
    Assumptions,
    Gpu,
    Payload,
    Popularity,
    Time,
    all_reduce,
    bytes_sent,
    exchange_layer,
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
from moe_export.planning.layout import EP_MODES, Layout
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

    Decode: one token for each sequence. Prefill: one whole sequence per rank (``alltoall``), or one for all
    ranks of the replica. With ``alltoall`` every rank has as many as the fullest: a rank without one of its
    own repeats another, as the runtime does.
    """
    mine = layout.sequences(load.batch)
    own = layout.own_sequences(load.batch) if phase == "decode" else 1
    together = mine if phase == "decode" else 1
    if layout.mode == "alltoall":
        together = own * layout.ranks
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
        slowest, average = _experts(
            arch, moe, popularity, round(tokens), step, layout, load, routing, machine
        )
        total += slowest * count
        parts["routed_experts"] += slowest.seconds * count
        mean += average * count
        if layout.mode in EP_MODES:
            each = load.weights.activation_bytes
            payload = _payload(arch.hidden, moe, popularity, tokens, layout, routing, each)
            exchange = exchange_layer(payload, machine.gpu, machine.assumptions)
            total += exchange.time * count
            sent += exchange.bytes * count
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
) -> tuple[Time, float]:
    """Time of the busiest rank, mean of all ranks; means over drawn batches."""
    import numpy as np

    shares = routing.shares(popularity, layout.ranks, layout.redundant)
    rows, used = rank_loads(sample_counts(popularity, tokens, routing.samples), shares)
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
    return time, float(seconds.mean()) + overhead


def _payload(
    hidden: int,
    moe: MoE,
    popularity: Popularity,
    tokens: float,
    layout: Layout,
    routing: Routing,
    each: int,
) -> Payload:
    """What one rank exchanges in one MoE layer; ``tokens`` of all ranks, ``each`` bytes per number sent."""
    ranks = layout.ranks
    if layout.mode != "alltoall":
        return bytes_sent("allreduce", ranks=ranks, hidden=hidden, top_k=moe.top_k, tokens=tokens)
    own = round(tokens / ranks)
    rows = float(own) if layout.full_blocks else routing.block(popularity, ranks, layout.redundant, own)
    return bytes_sent(
        "alltoall",
        ranks=ranks,
        hidden=hidden,
        top_k=moe.top_k,
        capacity=rows,
        each=each,
        load_known=not layout.full_blocks,
    )
