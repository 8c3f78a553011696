"""onnxscript's rewrites, held to what they say.

Its rules for ``x + 0``, ``x - 0``, ``x * 1`` and ``x / 1`` compare the constant with a tolerance (1e-8,
relative 1e-5), so they drop the ``1e-9`` of ``log(p + 1e-9)`` and of ``w / (w.sum() + 1e-20)``: minus
infinity and NaN follow where the model gives numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import EnvironmentLacksError


@contextmanager
def exact_rewrites() -> Iterator[None]:
    """Inside, those rules match 0 and 1 only.

    Raises:
        EnvironmentLacksError: this onnxscript does not hold its rules where they are known to be.
    """
    import onnxscript
    from onnxscript.rewriter._pattern_ir import Constant

    try:
        from onnxscript.rewriter.rules.common._no_op import rules

        constants = [
            value
            for rule in rules
            for node in rule._target_pattern
            for value in node.inputs
            if isinstance(value, Constant)
        ]
        before = [(c, c._rel_tol, c._abs_tol) for c in constants]
        if not constants:
            raise AttributeError("no constants in the rules")
    except (ImportError, AttributeError, TypeError) as error:
        raise EnvironmentLacksError(
            f"onnxscript {onnxscript.__version__} is not one that moe-export knows how to keep from dropping "
            "small "
            "constants; install the version in constraints.txt"
        ) from error
    try:
        for constant in constants:
            constant._rel_tol = constant._abs_tol = 0.0
        yield
    finally:
        for constant, relative, absolute in before:
            constant._rel_tol, constant._abs_tol = relative, absolute
