"""Collectives between ranks: bytes that one rank sends, predicted time (latency, bytes over bandwidth).

Inside a node the link counts, between nodes the network, for each GPU its own share of it. An all-reduce over
several nodes is hierarchical: reduce-scatter inside, all-reduce of each GPU's part across, all-gather inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_export.costs.gpus import Gpu
from moe_export.costs.roofline import Assumptions, Time
from moe_export.errors import UsageError


@dataclass(frozen=True)
class Exchange:
    """One collective as one rank sees it. Bytes sent over the link inside the node and over the network."""

    link_bytes: float
    network_bytes: float
    time: Time

    @property
    def bytes(self) -> float:
        return self.link_bytes + self.network_bytes

    def __add__(self, other: Exchange) -> Exchange:
        return Exchange(
            self.link_bytes + other.link_bytes,
            self.network_bytes + other.network_bytes,
            self.time + other.time,
        )


NOTHING = Exchange(0.0, 0.0, Time())


def all_reduce(size: float, ranks: int, gpu: Gpu, assumptions: Assumptions) -> Exchange:
    """Sum ``size`` bytes over ``ranks``, for all of them. A ring: each sends 2 (n-1)/n of the bytes."""
    if ranks <= 1:
        return NOTHING
    inside = min(ranks, gpu.node)
    nodes = -(-ranks // gpu.node)
    link = 2 * (inside - 1) / inside * size
    network = 2 * (nodes - 1) / nodes * size / inside
    seconds = link / (gpu.link * assumptions.link) + network / (gpu.network * assumptions.link)
    steps = 1 if nodes == 1 else 3
    return Exchange(link, network, Time(exchange=seconds + steps * assumptions.exchange_s))


def all_to_all(size: float, ranks: int, gpu: Gpu, assumptions: Assumptions) -> Exchange:
    """Every rank sends ``size``/``ranks`` bytes to each rank, itself included (that part stays).

    Link and network carry their parts at the same time.
    """
    if ranks <= 1:
        return NOTHING
    inside = min(ranks, gpu.node)
    link = size * (inside - 1) / ranks
    network = size * (ranks - inside) / ranks
    seconds = max(link / (gpu.link * assumptions.link), network / (gpu.network * assumptions.link))
    return Exchange(link, network, Time(exchange=seconds + assumptions.exchange_s))


@dataclass(frozen=True)
class Payload:
    """What one rank gives to the collectives of one MoE layer, in bytes.

    ``reduced``: what is summed, or whose largest is taken, over the ranks. ``blocks``: of each all-to-all the
    block for one rank; that for the rank itself stays.
    """

    ranks: int
    reduced: float
    blocks: tuple[float, ...] = ()

    @property
    def moved(self) -> float:
        """Bytes that all-to-alls send to other ranks."""
        return (self.ranks - 1) * sum(self.blocks)

    @property
    def sent(self) -> float:
        """Bytes that leave the rank, an all-reduce being a ring."""
        return self.moved + 2 * (self.ranks - 1) / self.ranks * self.reduced


def bytes_sent(
    mode: Literal["allreduce", "alltoall"],
    *,
    ranks: int,
    hidden: int,
    top_k: int,
    tokens: float = 0,
    capacity: float = 0,
    each: int = 4,
    load_known: bool = True,
) -> Payload:
    """What one rank exchanges in one MoE layer.

    ``allreduce``: the result of all ``tokens`` in float32, summed. ``alltoall``: to each rank a block of
    ``capacity`` rows of ``hidden`` numbers with ``each`` bytes and of ``top_k`` slots and weights in float32,
    and the rows back; before it, where blocks are as large as the fullest (``load_known``), one int64 tells
    all ranks how full that is.

    Raises:
        UsageError: no such mode.
    """
    if mode not in ("allreduce", "alltoall"):
        raise UsageError(f"no way to exchange {mode!r}; choices: allreduce, alltoall")
    if ranks <= 1:
        return Payload(max(ranks, 1), 0.0)
    if mode == "allreduce":
        return Payload(ranks, tokens * hidden * 4.0)
    rows, routes = capacity * hidden * each, capacity * 2 * top_k * 4
    return Payload(ranks, 8.0 if load_known else 0.0, (rows, routes, rows))


def exchange_layer(payload: Payload, gpu: Gpu, assumptions: Assumptions) -> Exchange:
    """The collectives of one MoE layer, one after the other."""
    total = NOTHING
    if payload.reduced:
        total += all_reduce(payload.reduced, payload.ranks, gpu, assumptions)
    for block in payload.blocks:
        total += all_to_all(block * payload.ranks, payload.ranks, gpu, assumptions)
    return total
