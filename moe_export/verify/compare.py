"""Numeric comparison of one tensor with its reference: how far off, where, and what is no number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TINY = 1e-30
SMALL_ROW = 0.1
"""A row below this part of the typical row is measured against the typical row (:func:`row_errors`)."""


@dataclass(frozen=True)
class Worst:
    """The element with the largest error. A value that is not finite is None here and named in ``note``."""

    index: tuple[int, ...]
    actual: float | None
    expected: float | None
    note: str = ""

    def text(self) -> str:
        """``at [0, 3, 7]: got 1.25, reference 1.5``."""
        where = "at [" + ", ".join(str(i) for i in self.index) + "]"
        if self.note:
            return f"{where}: {self.note}"
        return f"{where}: got {self.actual:.9g}, reference {self.expected:.9g}"


@dataclass(frozen=True)
class TensorError:
    """How one tensor differs from its reference over the compared elements.

    ``max_abs`` and ``rms`` are absolute; ``scale`` is max |reference|; ``relative`` = max_abs / scale. They
    are taken over the elements where both are finite and are None when there is none. ``nonfinite`` counts
    elements that are NaN on either side or infinite where the other is not equal. ``problem`` says why
    nothing could be compared (shape, dtype), else it is empty.
    """

    count: int
    scale: float = 0.0
    max_abs: float | None = None
    rms: float | None = None
    relative: float | None = None
    cosine: float | None = None
    nonfinite: int = 0
    worst: Worst | None = None
    problem: str = ""


def compare_arrays(
    actual: NDArray[Any], expected: NDArray[Any], valid: NDArray[np.bool_] | None = None
) -> TensorError:
    """Compare ``actual`` with ``expected`` in float64.

    ``valid`` is a mask over the leading dimensions (for example [batch, sequence]); only elements under a
    true entry count. Infinities of equal sign at the same place are equal; every other non-finite element
    counts as an error.
    """
    import numpy as np

    if actual.shape != expected.shape:
        problem = f"shape {_shape(actual)} where the reference has {_shape(expected)}"
        return TensorError(count=0, problem=problem)
    for what, array in (("engine", actual), ("reference", expected)):
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            return TensorError(count=0, problem=f"{what} has dtype {array.dtype}, which is not a number")
    if valid is not None and valid.shape != actual.shape[: valid.ndim]:
        problem = f"mask {_shape(valid)} does not fit shape {_shape(actual)}"
        return TensorError(count=0, problem=problem)
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    where = None
    if valid is not None and not valid.all():
        where = np.argwhere(valid)
        a, e = a[valid], e[valid]
    if a.size == 0:
        return TensorError(count=0)
    finite = np.isfinite(a) & np.isfinite(e)
    bad = ~finite & ~(np.isinf(a) & (a == e))
    nonfinite = int(bad.sum())
    difference = np.where(finite, np.abs(np.where(finite, a, 0.0) - np.where(finite, e, 0.0)), 0.0)
    flat = int(bad.argmax()) if nonfinite else int(difference.argmax())
    index = tuple(int(i) for i in np.unravel_index(flat, a.shape))
    worst = _worst(index, float(a[index]), float(e[index]), where)
    if not finite.any():
        return TensorError(count=a.size, nonfinite=nonfinite, worst=worst)
    good_a, good_e = a[finite], e[finite]
    scale = float(np.abs(good_e).max())
    max_abs = float(difference.max())
    return TensorError(
        count=a.size,
        scale=scale,
        max_abs=max_abs,
        rms=float(np.sqrt(np.mean((good_a - good_e) ** 2))),
        relative=max_abs / max(scale, _TINY) if max_abs else 0.0,
        cosine=_cosine(good_a, good_e),
        nonfinite=nonfinite,
        worst=worst,
    )


def row_errors(actual: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Largest error of each row of [T, N] relative to that row's own size: float64 [T].

    A row's size is max |reference| in it, but at least :data:`SMALL_ROW` of the median row's, so that rows
    which cancel to almost nothing are not blamed for rounding, and one huge row does not hide an error in the
    others. A row with a NaN, or an infinity the other side lacks, is infinitely wrong.

    Raises:
        ValueError: the shapes differ.
    """
    import numpy as np

    if actual.shape != expected.shape:
        raise ValueError(f"shape {_shape(actual)} where the reference has {_shape(expected)}")
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.size == 0:
        return np.zeros(a.shape[0])
    finite = np.isfinite(a) & np.isfinite(e)
    bad = ~finite & ~(np.isinf(a) & (a == e))
    difference = np.where(finite, np.abs(np.where(finite, a, 0.0) - np.where(finite, e, 0.0)), 0.0)
    difference = np.where(bad, np.inf, difference).max(axis=1)
    size = np.where(finite, np.abs(np.where(finite, e, 0.0)), 0.0).max(axis=1)
    return np.asarray(difference / np.maximum(row_floor(size), _TINY))


def row_floor(size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row sizes raised to at least :data:`SMALL_ROW` of the median of the rows that are not zero."""
    import numpy as np

    used = size[size > 0]
    return np.maximum(size, SMALL_ROW * float(np.median(used))) if used.size else size


def _worst(index: tuple[int, ...], actual: float, expected: float, where: NDArray[Any] | None) -> Worst:
    import math

    if where is not None:
        index = (*(int(i) for i in where[index[0]]), *index[1:])
    note = ""
    if not (math.isfinite(actual) and math.isfinite(expected)):
        note = f"got {actual}, reference {expected}"
    return Worst(
        index=index,
        actual=actual if math.isfinite(actual) else None,
        expected=expected if math.isfinite(expected) else None,
        note=note,
    )


def _cosine(a: NDArray[np.float64], e: NDArray[np.float64]) -> float:
    import numpy as np

    top_a, top_e = float(np.abs(a).max()), float(np.abs(e).max())
    if top_a == 0.0 or top_e == 0.0:
        return 1.0 if top_a == top_e else 0.0
    x, y = a / top_a, e / top_e
    return float(np.clip((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()), -1.0, 1.0))


def _shape(array: NDArray[Any]) -> str:
    return "[" + ", ".join(str(d) for d in array.shape) + "]"
