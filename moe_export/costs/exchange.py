"""Collectives between GPUs: bytes that one rank sends, predicted time (latency, bytes over bandwidth).

Inside a node the link counts, between nodes the network, for each GPU its own share of it. An all-reduce over
several nodes is hierarchical: reduce-scatter inside, all-reduce of each GPU's part across, all-gather inside.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_export.costs.gpus import Gpu
from moe_export.costs.roofline import Assumptions, Time


@dataclass(frozen=True)
class Exchange:
    """One collective as one rank sees it. Bytes sent over the link inside the node and over the network."""

    link_bytes: float
    network_bytes: float
    time: Time

    @property
    def bytes(self) -> float:
        return self.link_bytes + self.network_bytes


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
