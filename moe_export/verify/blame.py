"""Given that one MoE layer went wrong on a right input: what in it is wrong, from the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .layers import LayerComparison

_STEADY = 1e-3
"""A quantity whose spread is below this part of its mean counts as one constant."""


@dataclass(frozen=True)
class RouterBlame:
    """``kind`` (a finding's kind), the words for it, and the tokens [T] that show it."""

    kind: str
    words: str
    tokens: NDArray[np.bool_]


def blame_router(
    comparison: LayerComparison,
    fair: NDArray[np.bool_],
    unexplained: NDArray[np.bool_],
    weights_bad: NDArray[np.bool_],
    logits_bad: NDArray[np.bool_],
) -> RouterBlame | None:
    """What is wrong with a layer's routing, or None.

    All masks [T]: tokens to judge (``fair``), and among them those with another set of experts that no tie
    explains, those with wrong weights, those with wrong router logits.
    """
    routing = comparison.routing
    dropped = routing.dropped & unexplained
    if dropped.any():
        fewer = (comparison.engine.expert_ids < 0).sum(axis=1) > (comparison.reference.expert_ids < 0).sum(
            axis=1
        )
        word = "drops assignments that the source model keeps"
        if not fewer[dropped].any():
            word = "keeps assignments that the source model drops (capacity)"
        return RouterBlame("dropped token", f"the engine {word} at {int(dropped.sum())} token(s)", dropped)
    zeroed = weights_bad & _weight_lost(routing.weights)
    if zeroed.any() and (zeroed | ~weights_bad).all():
        words = (
            f"assignments lose their weight (0 instead of the source model's) at {int(zeroed.sum())} token(s)"
        )
        return RouterBlame("dropped token", words, zeroed)
    if unexplained.any() or logits_bad.any():
        tokens = unexplained | logits_bad | weights_bad
        chosen = f"{int(unexplained.sum())} of {int(fair.sum())} tokens choose other experts. "
        hint = _router_hint(comparison, logits_bad, bool(weights_bad.any()))
        return RouterBlame("wrong router", chosen + hint, tokens)
    if weights_bad.any():
        return RouterBlame("wrong router weights", _weight_hint(routing.weights, weights_bad), weights_bad)
    return None


def _weight_lost(weights: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]) -> NDArray[np.bool_]:
    ids, engine, reference = weights
    return ((ids >= 0) & (engine == 0.0) & (reference != 0.0)).any(axis=1)


def _router_hint(comparison: LayerComparison, logits_bad: NDArray[np.bool_], weights_bad: bool) -> str:
    import numpy as np

    mine, theirs = comparison.engine.logits, comparison.reference.logits
    if mine is None or theirs is None or comparison.logits is None:
        if weights_bad:
            return (
                "The layer's input agrees. Tokens with the right experts have wrong weights too, so it is "
                "probably the router's logits (its weights or bias)"
            )
        if comparison.routing.weights_judged.any():
            return (
                "The layer's input agrees. Tokens with the right experts have right weights, so it is "
                "probably the selection (selection bias, groups or top-k)"
            )
        return "The layer's input agrees. The reference records no router logits, so no closer cause is known"
    if logits_bad.any():
        difference = np.asarray(mine, np.float64) - np.asarray(theirs, np.float64)
        difference = difference[np.isfinite(difference).all(axis=1)]
        if len(difference) > 1:
            mean = difference.mean(axis=0)
            spread = np.abs(difference - mean).max()
            if spread <= _STEADY * np.abs(mean).max():
                steps = ", ".join(f"{v:+.4g}" for v in mean[:8]) + (", ..." if len(mean) > 8 else "")
                return (
                    f"Router logits differ by the same vector at every token ([{steps}]): "
                    "the router's bias is missing or wrong"
                )
        return (
            "Router logits differ although the layer's input agrees: the router's weights or bias are wrong"
        )
    largest = _top_sets(mine, comparison.engine.expert_ids.shape[1])
    plain = (largest == np.sort(comparison.engine.expert_ids, axis=1)).all(axis=1).mean()
    plain_reference = (largest == np.sort(comparison.reference.expert_ids, axis=1)).all(axis=1).mean()
    if plain > 0.99 and plain_reference < 0.99:
        return (
            "Router logits agree and the engine takes the largest of them, the source model does not: "
            "a selection bias or a group limit is not applied"
        )
    return "Router logits agree, so the selection is wrong (score, selection bias, groups or top-k)"


def _top_sets(logits: NDArray[Any], top_k: int) -> NDArray[Any]:
    import numpy as np

    return np.sort(np.argsort(-np.asarray(logits, np.float64), axis=1, kind="stable")[:, :top_k], axis=1)


def _weight_hint(weights: tuple[NDArray[Any], NDArray[Any], NDArray[Any]], bad: NDArray[np.bool_]) -> str:
    import numpy as np

    _ids, engine, reference = (w[bad] for w in weights)
    if not np.isfinite(engine).all():
        return "The same experts are chosen, but weights are NaN or infinite"
    sums, right = engine.sum(axis=1), reference.sum(axis=1)
    found = f"weights sum to {_span(sums)} instead of {_span(right)}"
    if (right == 0).any() or (np.abs(sums) < 1e-30).any():
        return f"The same experts are chosen; {found}"
    factor = sums / right
    proportional = np.abs(engine - factor[:, None] * reference).max() <= 1e-2 * np.abs(engine).max()
    if not proportional:
        return f"The same experts are chosen with weights in another proportion (score function); {found}"
    if _is_steady(factor) and len(factor) > 1:
        return f"Every weight is {factor.mean():.6g} times the source model's (scaled); {found}"
    if _is_steady(right) and not _is_steady(sums):
        return f"Weights are not renormalised: {found}"
    if _is_steady(sums) and not _is_steady(right):
        return f"Weights are renormalised although the source model's are not: {found}"
    return f"The same experts are chosen; {found}"


def _is_steady(values: NDArray[np.float64]) -> bool:
    import numpy as np

    return bool(values.std() <= _STEADY * np.abs(values).mean())


def _span(values: NDArray[np.float64]) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.6g}" if high - low <= _STEADY * abs(high) else f"{low:.6g} to {high:.6g}"


@dataclass(frozen=True)
class ExpertEvidence:
    """Tokens of one layer in one run: experts [T, K], weights [T, K], which outputs are ``bad`` [T].

    ``actual`` and ``expected`` are the bad outputs, [number of bad tokens, H].
    """

    expert_ids: NDArray[np.int32]
    weights: NDArray[np.float64]
    bad: NDArray[np.bool_]
    actual: NDArray[np.float64]
    expected: NDArray[np.float64]


def blame_experts(parts: Sequence[ExpertEvidence], limit: float) -> tuple[tuple[int, ...], str]:
    """The experts that explain the bad outputs, and the words for it; no expert when none explains them.

    An expert is innocent if some token uses it with a weight that matters (its share exceeds ``limit``, the
    largest error an output may have, several times) and comes out right. The fewest others that cover every
    bad token are guilty.
    """
    import numpy as np

    ids = np.concatenate([p.expert_ids for p in parts])
    weights = np.abs(np.concatenate([p.weights for p in parts]).astype(np.float64))
    bad = np.concatenate([p.bad for p in parts])
    actual = np.concatenate([p.actual for p in parts])
    expected = np.concatenate([p.expected for p in parts])
    share = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
    used = sorted({int(i) for i in ids[ids >= 0]})
    matters = share > min(0.5, 5 * limit)
    innocent = {int(i) for i in ids[~bad][matters[~bad] & (ids[~bad] >= 0)]}
    suspects = [e for e in used if e not in innocent]
    holds = {e: (ids == e).any(axis=1) & bad for e in suspects}
    left, guilty = bad.copy(), []
    while left.any() and suspects:
        best = max(suspects, key=lambda e: int((holds[e] & left).sum()))
        if not (holds[best] & left).any():
            break
        guilty.append(best)
        left &= ~holds[best]
    scaled = _scaled(actual, expected)
    if left.any() or not guilty:
        text = "no expert is in every wrong token: the weighted sum over experts (combine) is wrong"
        return (), text + scaled
    unclear = [e for e in suspects if e not in guilty]
    if not innocent and len(guilty) + len(unclear) == len(used):
        return (), f"every token is wrong, whatever its experts: activation, layout or combine{scaled}"
    names = ", ".join(str(e) for e in sorted(guilty))
    text = f"tokens are wrong exactly where they use expert{'s' if len(guilty) > 1 else ''} {names}"
    if len(guilty) == 2:
        text += " (two experts: their weights may be swapped)"
    if unclear:
        text += f"; expert(s) {', '.join(map(str, unclear))} never appear without them and may be wrong too"
    return tuple(sorted(guilty)), text + scaled


def _scaled(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> str:
    """`; outputs are 1.5 times ...` when one factor maps the one to the other, else nothing."""
    import numpy as np

    if not np.isfinite(actual).all() or len(actual) < 2:
        return ""
    energy = float((expected * expected).sum())
    factor = float((actual * expected).sum()) / energy if energy else 0.0
    if factor and np.abs(actual - factor * expected).max() <= _STEADY * np.abs(actual).max():
        return f"; outputs are {factor:.6g} times the source model's"
    return ""
