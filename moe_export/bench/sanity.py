"""Whether contestants compute the same thing: a fast engine with wrong numbers is not fast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .result import Sanity
from .runner import read_arrays

TOLERANCE = 1e-3
"""Of max(1, largest |logit|); float32 models agree to about 1e-5."""
SAMPLE_TOLERANCE = 0.05
"""The same for the few numbers kept of each timed run: wide, because in a long text one near tie may flip."""


def compare_check(own: Path, eager: Path | None, is_eager: bool, judged: bool, dtype: str) -> Sanity:
    """Compare the check results in ``own`` with PyTorch eager's (None: it does not take part).

    ``judged`` False: the error is reported only (an engine in a smaller dtype; ``verify`` judges it).
    """
    import numpy as np

    mine = read_arrays(own)
    bad = sorted(name for name, array in mine.items() if not np.isfinite(array).all())
    if bad:
        return Sanity(False, note=f"its {bad[0]} output is not finite")
    if is_eager:
        return Sanity(True, 0.0, 0.0, note="the yardstick")
    if eager is None:
        return Sanity(None, note="PyTorch eager did not run, so there is nothing to compare with")
    expected = read_arrays(eager)
    worst, tolerance = 0.0, TOLERANCE
    for name, array in expected.items():
        if name not in mine or mine[name].shape != array.shape:
            shape = list(mine[name].shape) if name in mine else "none"
            return Sanity(False, note=f"its {name} output has shape {shape}, eager's has {list(array.shape)}")
        if array.size:
            tolerance = max(tolerance, TOLERANCE * float(np.abs(array).max()))
            worst = max(worst, float(np.abs(mine[name] - array).max()))
    if not judged:
        return Sanity(None, worst, None, note=f"a {dtype} engine: verify judges its numbers")
    if worst > tolerance:
        return Sanity(
            False, worst, tolerance, note=f"largest error {worst:.3g} against eager, allowed {tolerance:.3g}"
        )
    return Sanity(True, worst, tolerance)


def compare_sample(own: Sequence[float], expected: Sequence[float]) -> str:
    """What is wrong with the numbers kept of a timed run; empty when nothing is."""
    import math

    if len(own) != len(expected):
        return f"{len(own)} numbers where eager has {len(expected)}"
    if not all(math.isfinite(v) for v in own):
        return "values that are not finite"
    scale = max([1.0, *(abs(v) for v in expected)])
    worst = max((abs(a - e) for a, e in zip(own, expected, strict=True)), default=0.0)
    return f"error {worst:.3g} against eager" if worst > SAMPLE_TOLERANCE * scale else ""
