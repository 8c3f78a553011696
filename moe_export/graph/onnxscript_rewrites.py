"""onnxscript's rewrites, held to what they say, to weights where they lie, and to a bearable time.

Its rules compare constants with a tolerance (1e-8, relative 1e-5), so the rules for ``x + 0`` and ``x * 1``
drop the ``1e-9`` of ``log(p + 1e-9)``, the ``1e-20`` of ``w / (w.sum() + 1e-20)`` and the epsilon of some
norms: minus infinity and NaN follow where the model gives numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from ..errors import EnvironmentLacksError

FLOAT32_ROUNDING = 1e-7


def _same(value: float, expected: float, *, rel_tol: float = 0.0, abs_tol: float = 0.0) -> bool:
    return math.isclose(value, expected, rel_tol=min(rel_tol, FLOAT32_ROUNDING), abs_tol=0.0)


@contextmanager
def exact_rewrites() -> Iterator[None]:
    """Inside, onnxscript's rules match a constant itself, up to float32 rounding, and nothing near it.

    Raises:
        EnvironmentLacksError: this onnxscript does not compare constants where it is known to.
    """
    import onnxscript
    from onnxscript.rewriter import _matcher

    if getattr(_matcher, "math", None) is None:
        raise EnvironmentLacksError(
            f"onnxscript {onnxscript.__version__} is not one that moe-export knows how to keep from dropping "
            "small "
            "constants; install the version in constraints.txt"
        )
    before = _matcher.math
    _matcher.math = SimpleNamespace(isclose=_same)
    try:
        yield
    finally:
        _matcher.math = before


@contextmanager
def weights_where_they_lie() -> Iterator[None]:
    """Inside, onnxscript does not transpose weights ahead of time, which would read and copy every one.

    Raises:
        EnvironmentLacksError: this onnxscript does not keep the ops it always folds where it is known to.
    """
    import onnxscript
    from onnxscript.optimizer import _constant_folding

    before = getattr(_constant_folding, "_DEFAULT_ALWAYS_FOLD_OPS", None)
    if before is None:
        raise EnvironmentLacksError(
            f"onnxscript {onnxscript.__version__} is not one that moe-export knows how to keep from copying "
            "weights; install the version in constraints.txt"
        )
    _constant_folding._DEFAULT_ALWAYS_FOLD_OPS = frozenset()
    try:
        yield
    finally:
        _constant_folding._DEFAULT_ALWAYS_FOLD_OPS = before


@contextmanager
def pairs_by_kind() -> Iterator[None]:
    """Inside, onnxscript's rule for two Slices is tried from Slices only; what it matches is the same.

    Otherwise it lists all nodes of the graph for each node of it, to find that most are no Slice. With all
    layers of DeepSeek-V3 that took more than six minutes; now the whole export takes less than three.

    Raises:
        EnvironmentLacksError: this onnxscript does not match patterns where it is known to.
    """
    import onnxscript
    from onnxscript.rewriter import _basics, _matcher

    matcher = getattr(_matcher, "SimplePatternMatcher", None)
    if matcher is None or not hasattr(_basics, "MatchResult"):
        raise EnvironmentLacksError(
            f"onnxscript {onnxscript.__version__} does not match patterns where moe-export knows it to; "
            "install the version in constraints.txt"
        )
    before = matcher.match

    def match(self: Any, model: Any, graph: Any, node: Any, **choices: Any) -> Any:
        kinds = [end.op_identifier() for end in self.pattern.output_nodes]
        if len(kinds) > 1 and kinds[0] is not None and kinds[0] != node.op_identifier():
            return _basics.MatchResult().fail("another kind of node")
        return before(self, model, graph, node, **choices)

    matcher.match = match
    try:
        yield
    finally:
        matcher.match = before
