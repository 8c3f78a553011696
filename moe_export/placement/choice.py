"""The placement that a build's configuration asks for, and what it gains on the trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moe_export.config import BuildConfig
from moe_export.errors import UsageError
from moe_export.placement.balance import contiguous, place
from moe_export.placement.load_trace import LoadTrace, read_load_trace
from moe_export.placement.measure import check_placement, imbalance
from moe_export.schema import Alternative, Decision, LayerPlacement, MoELayer


def placement_from_config(
    config: BuildConfig, layers: Sequence[MoELayer]
) -> tuple[tuple[LayerPlacement, ...], tuple[Decision, ...]]:
    """Where the experts of each of ``layers`` lie, in their order, and a decision for each with its reason.

    That of a balanced placement holds the busiest rank's load over the mean, before and after, on the trace.

    Raises:
        UsageError: ranks and experts do not go together, or the trace is missing or another model's.
    """
    experts = [layer.num_experts for layer in layers]
    if config.placement == "contiguous":
        found = contiguous(experts, config.ep)
        decisions = [
            Decision(_subject(layer), "contiguous", "experts in their order: nothing else was asked for")
            for layer in layers
        ]
    else:
        if config.trace is None:
            raise UsageError("placement: balanced needs a trace")
        trace = read_load_trace(Path(config.trace))
        trace.check_model([(layer.num_experts, layer.top_k) for layer in layers], "the model")
        found = place(
            trace.counts,
            config.ep,
            nodes=config.ep_nodes,
            groups=[_groups(layer) for layer in layers],
            redundant=config.redundant_experts,
        )
        decisions = [
            _decision(layer, placed, trace, index, config)
            for index, (layer, placed) in enumerate(zip(layers, found, strict=True))
        ]
    placed = tuple(
        dataclasses.replace(p, index=layer.index) for p, layer in zip(found, layers, strict=True)
    )
    check_placement(placed, experts, config.ep)
    return placed, tuple(decisions)


def _subject(layer: MoELayer) -> str:
    return f"{layer.name}: placement"


def _groups(layer: MoELayer) -> int | None:
    """Groups that the layer's router chooses between; None without any, or where the router is not known."""
    groups = (layer.router or {}).get("n_group", 1)
    return groups if isinstance(groups, int) and groups > 1 else None


def _decision(
    layer: MoELayer, placed: LayerPlacement, trace: LoadTrace, index: int, config: BuildConfig
) -> Decision:
    counts, groups = trace.counts[index], _groups(layer)
    together = config.ep_nodes > 1 and groups is not None and groups % config.ep_nodes == 0
    slots = [expert for held in placed.experts for expert in held]
    copied = {e: slots.count(e) for e in sorted(set(slots)) if slots.count(e) > 1}
    words = [
        f"busiest rank {imbalance(placed, counts):.3f} x the mean load on the trace ({trace.tokens} tokens)"
    ]
    alternatives: tuple[Alternative, ...] = ()
    if config.ep <= layer.num_experts:
        before = imbalance(contiguous([layer.num_experts], config.ep)[0], counts)
        words[0] += f", contiguous {before:.3f} x"
        alternatives = (Alternative("contiguous", f"busiest rank {before:.3f} x the mean load on the trace"),)
    if copied:
        words.append("replicas: " + ", ".join(f"expert {e} {n} times" for e, n in copied.items()))
    if (unused := config.redundant_experts - (len(slots) - layer.num_experts)) > 0:
        words.append(
            f"{unused} of {config.redundant_experts} redundant slots left out: more replicas do not help"
        )
    if config.ep_nodes > 1:
        words.append(
            f"{groups} groups of experts stay on one machine each"
            if together
            else f"no groups that {config.ep_nodes} machines divide: balanced over all ranks"
        )
    return Decision(_subject(layer), "balanced", "; ".join(words), alternatives)
