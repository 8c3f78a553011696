"""How a model's tokens spread over its experts: evenly, by a Zipf law, or as a trace has counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.costs import Popularity, fullest_block
from moe_export.inspect.architecture import Architecture
from moe_export.placement import contiguous, place, rank_shares, read_load_trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Routing:
    """One popularity per MoE layer, in the model's order. ``kind``: ``uniform``, ``zipf`` or ``trace``."""

    kind: str
    layers: tuple[Popularity, ...]
    facts: tuple[tuple[str, Any], ...] = ()
    balanced: bool = False
    """Experts lie on ranks by their load; otherwise in their order."""

    def placed_by_load(self) -> Routing:
        """The same routing, every layer's experts placed so that the loads of ranks are near even."""
        return replace(self, balanced=True)

    def shares(self, layer: Popularity, ranks: int, redundant: int) -> NDArray[np.float64]:
        """What share of each expert's rows each rank computes, float64 [E, ranks]."""
        return _shares(layer, ranks, redundant, self.balanced)

    def block(self, layer: Popularity, ranks: int, redundant: int, tokens: int) -> float:
        """Rows of the fullest block of an all-to-all, each rank having ``tokens``."""
        return _block(layer, ranks, redundant, self.balanced, tokens, self.samples)

    @cached_property
    def samples(self) -> int:
        """Batches drawn per layer: fewer where the layers differ, as their mean counts."""
        return 32 if len(set(self.layers)) <= 2 else 8

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. ``max_over_mean``: busiest expert's load over the mean, mean of the layers."""
        loads = [layer.max_over_mean for layer in self.layers]
        mean = sum(loads) / len(loads) if loads else None
        return {"kind": self.kind, **dict(self.facts), "max_over_mean": mean}


@lru_cache(maxsize=1024)
def _shares(layer: Popularity, ranks: int, redundant: int, balanced: bool) -> NDArray[np.float64]:
    experts = len(layer.chances)
    if balanced:
        (placement,) = place([layer.chances], ranks, redundant=redundant)
    else:
        (placement,) = contiguous([experts], ranks)
    return rank_shares(placement, experts)


@lru_cache(maxsize=4096)
def _block(
    layer: Popularity, ranks: int, redundant: int, balanced: bool, tokens: int, samples: int
) -> float:
    return fullest_block(layer, _shares(layer, ranks, redundant, balanced), tokens, samples)


def uniform_routing(arch: Architecture) -> Routing:
    """Every expert as likely as any other."""
    return Routing("uniform", tuple(Popularity.uniform(m.experts, m.top_k) for m in arch.moe_layers))


def zipf_routing(arch: Architecture, exponent: float) -> Routing:
    """The r-th most popular expert of every layer in proportion to 1 / r^exponent.

    Raises:
        UsageError: a negative or infinite exponent.
    """
    layers = tuple(Popularity.zipf(m.experts, m.top_k, exponent) for m in arch.moe_layers)
    return Routing("zipf", layers, (("exponent", exponent),))


def read_trace(path: Path, arch: Architecture, name: str) -> Routing:
    """Popularity from the JSON that ``moe-export trace --json FILE`` writes, for the model ``name``.

    Raises:
        UsageError: not such a file, or the trace of a model with other layers or experts.
    """
    trace = read_load_trace(path)
    trace.check_model([(moe.experts, moe.top_k) for moe in arch.moe_layers], name)
    found = tuple(Popularity.from_counts(counts, trace.tokens) for counts in trace.counts)
    return Routing("trace", found, (("file", path.name), ("tokens", trace.tokens)))
