"""Compares the routing of one MoE layer token by token: expert sets, order, weights, near ties apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .compare import row_floor
from .ties import TieProver, logit_bound

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..trace import LayerTrace

_TINY = 1e-30


@dataclass(frozen=True)
class TokenRouting:
    """Agreement per token, arrays [T]; ``weight_error`` is NaN where weights cannot be compared."""

    same: NDArray[np.bool_]
    ordered: NDArray[np.bool_]
    near_tie: NDArray[np.bool_]
    after_tie: NDArray[np.bool_]
    unexplained: NDArray[np.bool_]
    dropped: NDArray[np.bool_]
    weight_error: NDArray[np.float64]
    weights: tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]
    """Expert ids, engine weights, reference weights: [T, K], sorted by expert; dropped ones weigh 0."""
    bound: NDArray[np.float64]
    margin: str

    @property
    def weights_judged(self) -> NDArray[np.bool_]:
        """Tokens whose weights are comparable: equal sets, input not changed by an earlier tie."""
        import numpy as np

        return ~np.isnan(self.weight_error)


def compare_routing(
    engine: LayerTrace,
    reference: LayerTrace,
    prover: TieProver,
    *,
    near_tie: float | NDArray[np.float64],
    weight_limit: float,
    moved: NDArray[np.bool_] | None = None,
    tie_before: bool = False,
) -> TokenRouting:
    """Compare the routing [T, K] of T tokens.

    ``near_tie`` bounds the relative error of router logits (one number or [T]). A tie proven on the engine's
    own logits counts only where weights confirm those logits: within ``weight_limit``, tokens with equal sets
    have equal weights and, in a plain router, so has the token itself, rank by rank. ``moved`` [T] marks
    tokens whose layer input already differs from the reference's; with ``tie_before`` (a proven near tie
    flipped in an earlier layer) their differences are consequences, not causes.

    Raises:
        ValueError: the shapes differ.
    """
    import numpy as np

    ids_a, ids_e = engine.expert_ids, reference.expert_ids
    if (
        ids_a.shape != ids_e.shape
        or engine.weights.shape != ids_a.shape
        or reference.weights.shape != ids_e.shape
    ):
        raise ValueError(f"routing of shape {list(ids_a.shape)} where the reference has {list(ids_e.shape)}")
    order_a, order_e = (np.argsort(ids, axis=1, kind="stable") for ids in (ids_a, ids_e))
    sorted_a, sorted_e = (
        np.take_along_axis(ids_a, order_a, axis=1),
        np.take_along_axis(ids_e, order_e, axis=1),
    )
    same = (sorted_a == sorted_e).all(axis=1)
    dropped = (ids_a < 0).sum(axis=1) != (ids_e < 0).sum(axis=1)
    weights_a = np.take_along_axis(np.asarray(engine.weights, np.float64), order_a, axis=1)
    weights_e = np.take_along_axis(np.asarray(reference.weights, np.float64), order_e, axis=1)
    weights_a, weights_e = np.where(sorted_a >= 0, weights_a, 0.0), np.where(sorted_e >= 0, weights_e, 0.0)
    error = _weight_errors(weights_a, weights_e)
    bound = logit_bound(prover.logits, near_tie) if prover.logits is not None else np.zeros(len(ids_e))
    tie = prover.proves(~same & ~dropped, ids_e if prover.by_engine else ids_a, bound)
    if prover.by_engine and tie.any():
        tie &= _confirmed(prover, same, error, weights_a, weights_e, weight_limit)
    consequence = np.zeros(len(ids_e), bool)
    if tie_before and moved is not None:
        consequence = moved & ~tie
    # A flipped choice takes a slot of its expert, so with a capacity others are dropped in its place: at most
    # two per assignment that moved (one at the expert it left, one at the expert it joined).
    moved_assignments = ids_e.shape[1] * int((tie | (consequence & ~same & ~dropped)).sum())
    changed_drops = dropped & ~same
    if 0 < int(changed_drops.sum()) <= 2 * moved_assignments:
        consequence |= changed_drops
    else:
        consequence &= ~changed_drops
    after = ~same & ~tie & consequence
    return TokenRouting(
        same=same,
        ordered=(ids_a == ids_e).all(axis=1),
        near_tie=tie,
        after_tie=after,
        unexplained=~same & ~tie & ~after,
        dropped=dropped,
        weight_error=np.where(same & ~consequence, error, np.nan),
        weights=(sorted_e, weights_a, weights_e),
        bound=bound,
        margin=prover.why,
    )


def _confirmed(
    prover: TieProver,
    same: NDArray[np.bool_],
    error: NDArray[np.float64],
    engine: NDArray[np.float64],
    reference: NDArray[np.float64],
    limit: float,
) -> NDArray[np.bool_]:
    """Per token, whether weights bear the engine's logits out, so that a tie in them is one of the source's
    too."""
    import numpy as np

    if prover.plain:
        return _weight_errors(np.sort(engine, axis=1), np.sort(reference, axis=1)) <= limit
    agree = bool(same.any()) and bool((error[same] <= limit).all())
    return np.full(len(same), agree)


def _weight_errors(a: NDArray[np.float64], e: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per token, the largest error relative to its largest weight; not finite: infinite."""
    import numpy as np

    if not e.size:
        return np.zeros(len(e))
    finite = np.isfinite(a) & np.isfinite(e)
    difference = np.where(finite, np.abs(np.where(finite, a, 0.0) - np.where(finite, e, 0.0)), np.inf)
    size = np.where(finite, np.abs(np.where(finite, e, 0.0)), 0.0)
    return np.asarray(difference.max(axis=1) / np.maximum(row_floor(size.max(axis=1)), _TINY))
