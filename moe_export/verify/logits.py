"""What a language model's user notices: next-token distribution (KL), top-1 choice, cross-entropy on text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LogitError:
    """Comparison of next-token distributions over the compared positions; KL and cross-entropy in nats.

    ``kl_mean`` and ``kl_max`` are KL(reference || engine) per position. ``top1`` is the part of positions
    with the same first choice; ``top1_unexplained`` the part that differs although the reference prefers its
    choice by more than ``tie_bound`` (in logits). Cross-entropies need text, else they are None. All are None
    when a value is NaN.
    """

    tokens: int
    kl_mean: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    top1_unexplained: float | None = None
    tie_bound: float = 0.0
    cross_entropy: float | None = None
    cross_entropy_reference: float | None = None

    @property
    def cross_entropy_change(self) -> float | None:
        """Engine minus reference, or None without text."""
        if self.cross_entropy is None or self.cross_entropy_reference is None:
            return None
        return self.cross_entropy - self.cross_entropy_reference


def compare_logits(
    actual: NDArray[Any],
    expected: NDArray[Any],
    valid: NDArray[np.bool_],
    labels: NDArray[np.int64] | None = None,
    tie_bound: float = 0.0,
) -> LogitError:
    """Compare logits [batch, sequence, vocab] where ``valid`` [batch, sequence] is true.

    ``labels`` [batch, sequence] are the token ids themselves; position *p* is scored on the token at *p + 1*,
    and only where both are valid.

    Raises:
        ValueError: shapes do not fit one another.
    """
    import numpy as np

    if actual.shape != expected.shape or actual.ndim != 3 or actual.shape[:2] != valid.shape:
        raise ValueError(f"logits {actual.shape}, reference {expected.shape}, mask {valid.shape} do not fit")
    a = np.asarray(actual[valid], np.float64)
    e = np.asarray(expected[valid], np.float64)
    tokens = int(a.shape[0])
    if tokens == 0 or np.isnan(a).any() or np.isnan(e).any() or np.isposinf(a).any() or np.isposinf(e).any():
        return LogitError(tokens=tokens, tie_bound=tie_bound)
    log_a, log_e = log_softmax(a), log_softmax(e)
    kl = kl_divergence(log_e, log_a)
    first_a, first_e = a.argmax(axis=-1), e.argmax(axis=-1)
    rows = np.arange(tokens)
    margin = e[rows, first_e] - e[rows, first_a]
    finite_kl = bool(np.isfinite(kl).all())
    change: tuple[float | None, float | None] = (None, None)
    if labels is not None:
        change = _cross_entropies(log_a, log_e, valid, labels)
    return LogitError(
        tokens=tokens,
        kl_mean=float(kl.mean()) if finite_kl else None,
        kl_max=float(kl.max()) if finite_kl else None,
        top1=float((first_a == first_e).mean()),
        top1_unexplained=float((margin > tie_bound).mean()),
        tie_bound=tie_bound,
        cross_entropy=change[0],
        cross_entropy_reference=change[1],
    )


def log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of softmax over the last axis, stable; −inf stays −inf."""
    import numpy as np

    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) over the last axis, in nats, from log-probabilities; never below 0, infinite where q misses
    p."""
    import numpy as np

    p = np.exp(log_p)
    used = p > 0
    with np.errstate(invalid="ignore"):
        terms = np.where(used, p * (log_p - log_q), 0.0)
    return np.maximum(terms.sum(axis=-1), 0.0)


def _cross_entropies(
    log_a: NDArray[np.float64],
    log_e: NDArray[np.float64],
    valid: NDArray[np.bool_],
    labels: NDArray[np.int64],
) -> tuple[float | None, float | None]:
    import numpy as np

    scored = np.zeros_like(valid)
    scored[:, :-1] = valid[:, :-1] & valid[:, 1:]
    following = np.zeros_like(labels)
    following[:, :-1] = labels[:, 1:]
    rows = np.flatnonzero(scored[valid])
    if rows.size == 0:
        return None, None
    target = following[valid][rows]
    got, want = -float(log_a[rows, target].mean()), -float(log_e[rows, target].mean())
    return (got, want) if np.isfinite([got, want]).all() else (None, None)
