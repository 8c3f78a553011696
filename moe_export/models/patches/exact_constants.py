"""The ONNX optimizer takes a constant within 1e-8 of zero for zero and drops ``x + 1e-8``, an epsilon of some
norms, and takes one within 1e-5 of one for one. Here only the constant itself, up to float32 rounding,
matches.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from . import replaced

FLOAT32_ROUNDING = 1e-7


def _same(value: float, expected: float, *, rel_tol: float = 0.0, abs_tol: float = 0.0) -> bool:
    return math.isclose(value, expected, rel_tol=min(rel_tol, FLOAT32_ROUNDING), abs_tol=0.0)


@contextmanager
def exact_constants() -> Iterator[None]:
    """Inside, onnxscript's rewrite rules match constants exactly."""
    from onnxscript.rewriter import _matcher

    with replaced(_matcher, math=SimpleNamespace(isclose=_same)):
        yield
