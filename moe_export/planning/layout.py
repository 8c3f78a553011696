"""Ways to put a model on some GPUs, and the memory that each takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_export.inspect.architecture import Architecture
from moe_export.inspect.needs import Workload, rank_bytes, sequence_bytes

Mode = Literal["single", "allreduce", "alltoall", "tensor"]

EP_MODES: tuple[Mode, ...] = ("allreduce", "alltoall")


@dataclass(frozen=True)
class Layout:
    """``replicas`` copies of the model, each on ``ranks`` GPUs.

    ``allreduce``: each rank has its experts and all of the rest, and sees all sequences of its replica; one
    all-reduce per MoE layer. ``alltoall``: the same weights, but sequences are divided over the ranks; two
    exchanges of tokens per MoE layer, there and back. ``tensor``: every matrix and head divided evenly, two
    all-reduces per layer. ``single``: one GPU per copy.
    """

    mode: Mode
    ranks: int
    replicas: int
    redundant: int = 0
    """Slots per MoE layer that hold replicas of busy experts."""
    full_blocks: bool = False
    """Of ``alltoall``: blocks have room for all tokens of a rank, as in TensorRT plans, whose shapes cannot
    depend on the routing; otherwise all are as large as the fullest has to be."""

    def sequences(self, batch: int) -> int:
        """Sequences of the fullest replica."""
        return -(-batch // self.replicas)

    def own_sequences(self, batch: int) -> int:
        """Sequences whose attention the fullest rank computes, and whose cache it keeps."""
        mine = self.sequences(batch)
        return -(-mine // self.ranks) if self.mode == "alltoall" else mine

    def memory(self, arch: Architecture, load: Workload) -> float:
        """Weights and cache on the fullest GPU, in bytes."""
        if self.mode == "tensor":
            cache = self.sequences(load.batch) * sequence_bytes(arch, load)
            return (load.weights.bytes_of(arch.parameters()) + cache) / self.ranks
        return rank_bytes(arch, load, self.ranks, self.own_sequences(load.batch), self.redundant)

    def largest_batch(self, arch: Architecture, load: Workload, room: float) -> int:
        """The largest batch at the workload's context that fits into ``room`` bytes per GPU; 0 for none."""
        if self.mode == "tensor":
            left = room * self.ranks - load.weights.bytes_of(arch.parameters())
        else:
            left = room - rank_bytes(arch, load, self.ranks, 0, self.redundant)
        if left < 0:
            return 0
        own = int(left // max(sequence_bytes(arch, load), 1))
        return own * self.replicas * (self.ranks if self.mode == "alltoall" else 1)

    @property
    def text(self) -> str:
        """For people: ``EP 8 (alltoall) x 1``."""
        copies = "1 copy" if self.replicas == 1 else f"{self.replicas} copies"
        if self.mode == "single":
            return f"{copies}, each on 1 GPU" if self.replicas > 1 else "1 GPU"
        name = "TP" if self.mode == "tensor" else "EP"
        kind = "" if self.mode == "tensor" else f" {self.mode}"
        return f"{name} {self.ranks}{kind}, {copies}"


def layouts(arch: Architecture, gpus: int, modes: tuple[Mode, ...] = EP_MODES) -> tuple[Layout, ...]:
    """Every way to use ``gpus`` GPUs alike: by experts for a model with experts, else by tensors."""
    found = [Layout("single", 1, gpus)]
    ways: tuple[Mode, ...] = modes if arch.moe_layers else ("tensor",)
    most = min((moe.experts for moe in arch.moe_layers), default=min(gpus, 64))
    for ranks in range(2, min(gpus, most) + 1):
        if gpus % ranks == 0:
            found += [Layout(mode, ranks, gpus // ranks) for mode in ways]
    return tuple(found)
