"""How a model's tokens spread over its experts: evenly, by a Zipf law, or as a trace has counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_export.costs import Popularity
from moe_export.inspect.architecture import Architecture
from moe_export.placement import read_load_trace


@dataclass(frozen=True)
class Routing:
    """One popularity per MoE layer, in the model's order. ``kind``: ``uniform``, ``zipf`` or ``trace``."""

    kind: str
    layers: tuple[Popularity, ...]
    facts: tuple[tuple[str, Any], ...] = ()

    def placed_by_load(self, ranks: int) -> Routing:
        """The same routing, every layer's experts placed on ``ranks`` so that their loads are near even."""
        placed = {layer: layer.placed_by_load(ranks) for layer in set(self.layers)}
        return replace(self, layers=tuple(placed[layer] for layer in self.layers))

    @cached_property
    def samples(self) -> int:
        """Batches drawn per layer: fewer where the layers differ, as their mean counts."""
        return 32 if len(set(self.layers)) <= 2 else 8

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. ``max_over_mean``: busiest expert's load over the mean, mean of the layers."""
        loads = [layer.max_over_mean for layer in self.layers]
        mean = sum(loads) / len(loads) if loads else None
        return {"kind": self.kind, **dict(self.facts), "max_over_mean": mean}


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
