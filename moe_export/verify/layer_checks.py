"""Checks of one MoE layer in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .agreement import place
from .compare import compare_arrays
from .layers import LayerComparison, LayerResult, row_error
from .result import Check
from .tolerance import FEW_TOKENS, Tolerances

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def layer_checks(comparison: LayerComparison, forced: bool, tolerances: Tolerances) -> list[Check]:
    """Checks of one layer: input, router logits and output on tokens no tie touched, routing of free runs."""
    judged = forced or tolerances.exact_routing
    mine, theirs = comparison.engine, comparison.reference
    checks = _row_checks(
        comparison, "input", comparison.hidden, mine.hidden, theirs.hidden, judged, tolerances
    )
    if comparison.logits is not None and mine.logits is not None and theirs.logits is not None:
        checks += _row_checks(
            comparison, "router logits", comparison.logits, mine.logits, theirs.logits, judged, tolerances
        )
    checks += _row_checks(
        comparison, "output", comparison.output, mine.output, theirs.output, judged, tolerances
    )
    if not forced:
        checks += _routing_checks(comparison.result, tolerances)
    return checks


def _row_checks(
    comparison: LayerComparison,
    what: str,
    errors: NDArray[np.float64],
    actual: NDArray[Any],
    expected: NDArray[Any],
    judged: bool,
    tolerances: Tolerances,
) -> list[Check]:
    import numpy as np

    fair = np.flatnonzero(~comparison.after_tie)
    if not fair.size:
        return []
    row = row_error(errors[fair], [comparison.coordinates[int(t)] for t in fair])
    worst = int(fair[int(np.argmax(errors[fair]))])
    element = compare_arrays(actual[worst], expected[worst]).worst
    where = place(row.batch, row.position, row.token) + (f" {element.text()}" if element is not None else "")
    limit, rms = tolerances["moe.output"], tolerances["moe.output.rms"]
    subject = f"{comparison.layer.name} {what}"
    if row.nonfinite or row.max is None or row.rms is None:
        detail = f"{row.nonfinite} token(s) with a value that is not finite; first {where}"
        return [Check(limit.name, subject, None, limit.value, False, limit.reason, True, detail)]
    excuse = "" if judged else "a flipped near tie changes values; they are judged with routing forced"
    checks = [
        Check(
            limit.name,
            subject,
            row.max,
            limit.value,
            row.max <= limit.value,
            excuse or limit.reason,
            judged,
            where,
        ),
        Check(
            rms.name,
            subject,
            row.rms,
            rms.value,
            row.rms <= rms.value,
            excuse or rms.reason,
            judged,
            f"over {fair.size} tokens; worst {where}",
        ),
    ]
    if judged and not tolerances.exact_routing and fair.size >= FEW_TOKENS:
        even = tolerances["moe.outlier"]
        ratio = row.max / max(float(np.median(errors[fair])), 1e-30)
        passed = row.max <= tolerances.token_limit(errors[fair])
        checks.append(Check(even.name, subject, ratio, even.value, passed, even.reason, True, where))
    return checks


def _routing_checks(layer: LayerResult, tolerances: Tolerances) -> list[Check]:
    routing = layer.routing
    if routing is None or not routing.tokens:
        return []
    limit = tolerances["moe.routing"]
    part = routing.unexplained / routing.tokens
    detail = (
        f"{routing.same_sets} of {routing.tokens} tokens choose the same experts; "
        f"{routing.near_ties} near ties, {routing.after_ties} after a tie, {routing.unexplained} unexplained"
    )
    first = routing.examples[0] if routing.examples else None
    if first is not None and first.kind == "unexplained":
        where = place(first.batch, first.position, first.token)
        gap = (
            "margin unknown: " + routing.margin
            if first.gap is None or first.bound is None
            else (f"logit gap {first.gap:.3g}, bound {first.bound:.3g}")
        )
        detail += f"; first {where}: engine {list(first.engine)}, reference {list(first.reference)} ({gap})"
    checks = [
        Check(limit.name, layer.name, part, limit.value, part <= limit.value, limit.reason, True, detail)
    ]
    over = f"{routing.weight_tokens} tokens with the same experts"
    if routing.weight_worst is not None:
        over += f"; worst {routing.weight_worst.text()}"
    for level, value in (("moe.weights", routing.weight_max), ("moe.weights.rms", routing.weight_rms)):
        bound = tolerances[level]
        if routing.weight_nonfinite:
            text = f"{routing.weight_nonfinite} token(s) have a weight that is not finite; {over}"
            checks.append(Check(level, layer.name, None, bound.value, False, bound.reason, True, text))
        elif value is not None:
            checks.append(
                Check(level, layer.name, value, bound.value, value <= bound.value, bound.reason, True, over)
            )
    return checks


def broken_layer(layer: LayerResult) -> Check:
    """The failing check of a layer that could not be compared."""
    return Check(
        "moe.output",
        layer.name,
        None,
        0.0,
        False,
        "without equal shapes nothing can be compared",
        True,
        layer.problem,
    )
