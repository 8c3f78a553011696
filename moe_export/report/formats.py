"""Numbers as people read them; used by the HTML report."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"


def number(value: Any, digits: int = 3) -> str:
    """``1.23e-06``, ``0.125``, ``1,024``; a dash for None."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def milliseconds(value: float | None) -> str:
    """``0.042``, ``3.78``, ``165``."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """``0.94 s``, ``165 s``."""
    if value is None:
        return MISSING
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def times(value: float | None) -> str:
    """A speed-up: ``1.84×``."""
    return MISSING if value is None else f"{value:.2f}×"


def percent(value: float | None, digits: int = 1) -> str:
    """A part of 1 as percentage; never rounded up to 100 % when it is less."""
    if value is None:
        return MISSING
    if value < 1.0 and round(value * 100, digits) >= 100.0:
        return f"> {100 - 10**-digits:.{digits}f} %"
    return f"{value * 100:.{digits}f} %"


def size(count: int | None) -> str:
    """Bytes: ``4.2 MiB``."""
    if count is None:
        return MISSING
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def parameters(count: int | None) -> str:
    """A parameter count: ``46.70 B``, ``3.41 M``."""
    if count is None:
        return MISSING
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return str(count)


def shape(dims: Any) -> str:
    """``[batch, sequence, 259]``."""
    return "[" + ", ".join(str(d) for d in dims) + "]"
