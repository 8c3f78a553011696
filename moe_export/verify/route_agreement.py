"""How many tokens an engine with quantised experts sends elsewhere, over all cases."""

from __future__ import annotations

from collections.abc import Sequence

from .result import CaseResult, Finding
from .tolerance import AGREEMENT, Tolerances


def agreement_findings(results: Sequence[CaseResult], tolerances: Tolerances) -> list[Finding]:
    """A finding for each MoE layer whose tokens choose other experts more often than the limit allows.

    Near ties count here: each one is explained by the error of quantisation, and too many of them are not.
    Empty for engines without quantised experts.
    """
    if AGREEMENT not in tolerances.limits:
        return []
    limit = tolerances[AGREEMENT]
    tokens: dict[int, int] = {}
    same: dict[int, int] = {}
    names: dict[int, str] = {}
    cases: dict[int, list[str]] = {}
    for result in results:
        if result.mode != "free":
            continue
        for layer in result.layers:
            if layer.routing is None:
                continue
            index, names[layer.index] = layer.index, layer.name
            tokens[index] = tokens.get(index, 0) + layer.routing.tokens
            same[index] = same.get(index, 0) + layer.routing.same_sets
            if layer.routing.same_sets < layer.routing.tokens:
                cases.setdefault(index, []).append(result.name)
    return [
        Finding(
            "wrong router",
            f"layer {i} ({names[i]}): {1 - same[i] / tokens[i]:.2%} of {tokens[i]} tokens choose other "
            f"experts than the source, near ties included; limit {limit.value:.2%} of {AGREEMENT} "
            f"({limit.reason})",
            tuple(cases[i]),
            layer=i,
            layer_name=names[i],
        )
        for i in sorted(tokens)
        if tokens[i] and 1 - same[i] / tokens[i] > limit.value
    ]
