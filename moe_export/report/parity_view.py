"""What the page shows of a parity report: the worst of each level, each layer and each case."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..verify.agreement import RoutingDifference
from ..verify.result import CaseResult, Check, ParityReport

MOST_EXAMPLES = 12


@dataclass(frozen=True)
class LevelView:
    """All checks of one level. ``worst``: the one nearest to its limit or furthest beyond."""

    level: str
    measures: str
    reason: str
    worst: Check
    case: str
    checks: int
    failed: int


@dataclass(frozen=True)
class LayerView:
    """One MoE layer over all cases; errors are relative per token. Routing is of runs where the engine
    routes."""

    index: int
    name: str
    hidden: float | None
    logits: float | None
    output: float | None
    tokens: int
    same_sets: int
    near_ties: int
    unexplained: int
    problem: str

    @property
    def agreement(self) -> float | None:
        """Part of token choices with the reference's experts; None where nothing was compared."""
        return self.same_sets / self.tokens if self.tokens else None


@dataclass(frozen=True)
class TieView:
    """A token whose experts differ from the reference's, and where."""

    case: str
    layer: int
    difference: RoutingDifference


def levels(report: ParityReport) -> list[LevelView]:
    """One entry per judged level, failed ones first, else in the order of the tolerances."""
    found: dict[str, list[tuple[CaseResult, Check]]] = {}
    for case in report.cases:
        for check in case.checks:
            if check.judged:
                found.setdefault(check.level, []).append((case, check))
    limits = {limit.name: limit for limit in report.tolerances}
    order = {name: i for i, name in enumerate(limits)}
    views = []
    for level, pairs in found.items():
        case, worst = max(pairs, key=lambda pair: _badness(pair[1]))
        limit = limits.get(level)
        views.append(
            LevelView(
                level=level,
                measures=limit.measures if limit is not None else "",
                reason=worst.reason or (limit.reason if limit is not None else ""),
                worst=worst,
                case=case.name,
                checks=len(pairs),
                failed=sum(not c.passed for _, c in pairs),
            )
        )
    return sorted(views, key=lambda v: (v.failed == 0, order.get(v.level, len(order))))


def _badness(check: Check) -> tuple[bool, float]:
    value = float("inf") if check.value is None else check.value
    return not check.passed, value / check.limit if check.limit > 0 else value


def layer_views(report: ParityReport) -> list[LayerView]:
    """One entry per MoE layer in order."""
    indices = sorted({layer.index for case in report.cases for layer in case.layers})
    return [_layer(report, index) for index in indices]


def _layer(report: ParityReport, index: int) -> LayerView:
    found = [(case, layer) for case in report.cases for layer in case.layers if layer.index == index]
    routing = [layer.routing for case, layer in found if case.mode == "free" and layer.routing is not None]
    problems = [layer.problem for _, layer in found if layer.problem]
    return LayerView(
        index=index,
        name=found[0][1].name,
        hidden=_worst(layer.hidden.max for _, layer in found if layer.hidden is not None),
        logits=_worst(layer.logits.max for _, layer in found if layer.logits is not None),
        output=_worst(layer.output.max for _, layer in found if layer.output is not None),
        tokens=sum(r.tokens for r in routing),
        same_sets=sum(r.same_sets for r in routing),
        near_ties=sum(r.near_ties for r in routing),
        unexplained=sum(r.unexplained for r in routing),
        problem=problems[0] if problems else "",
    )


def _worst(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def ties(report: ParityReport) -> list[TieView]:
    """The first tokens that were routed otherwise, those without an explanation first."""
    found = [
        TieView(case.name, layer.index, difference)
        for case in report.cases
        if case.mode == "free"
        for layer in case.layers
        if layer.routing is not None
        for difference in layer.routing.examples
    ]
    kinds = ("unexplained", "near tie")
    found.sort(key=lambda t: kinds.index(t.difference.kind) if t.difference.kind in kinds else len(kinds))
    return found[:MOST_EXAMPLES]
