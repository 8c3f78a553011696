"""Shape and grid expressions of the contracts: integers, symbols, ``+ - * //``, ``cdiv``, ``max``, ``min``.

They are text, because each user has its own numbers: Python's ints when launching, TensorRT's symbolic
dimensions when a plan is built, names when a page is written.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from moe_export.errors import UsageError

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(
    text: str,
    values: Mapping[str, Any],
    *,
    cdiv: Callable[[Any, Any], Any] | None = None,
    maximum: Callable[[Any, Any], Any] | None = None,
    minimum: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """The value of ``text``. ``values`` are ints, or objects with ``+ - * //`` (an int may be on the right).

    ``cdiv`` (ceiling division), ``maximum`` and ``minimum`` of two such objects: by default Python's own on
    ints. Where both sides are ints, the result is one, whatever functions were given.

    Raises:
        UsageError: an unknown symbol, or something an expression may not hold.
    """

    def number(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in values:
                raise UsageError(f"expression {text!r}: unknown symbol {node.id!r}")
            return values[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = number(node.left), number(node.right)
            if isinstance(left, int) and not isinstance(right, int) and not isinstance(node.op, ast.Sub):
                if isinstance(node.op, ast.FloorDiv):
                    raise UsageError(f"expression {text!r}: a number divided by a symbol")
                left, right = right, left  # a + b and a * b, for objects that only take ints on the right
            return _OPERATORS[type(node.op)](left, right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
            a, b = (number(x) for x in node.args)
            plain = isinstance(a, int) and isinstance(b, int)
            if node.func.id == "cdiv":
                return -(-a // b) if plain or cdiv is None else cdiv(a, b)
            if node.func.id == "max":
                return max(a, b) if plain or maximum is None else maximum(a, b)
            if node.func.id == "min":
                return min(a, b) if plain or minimum is None else minimum(a, b)
        raise UsageError(f"expression {text!r}: {ast.dump(node)} is not allowed")

    return number(_parsed(text))


@lru_cache(maxsize=256)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
