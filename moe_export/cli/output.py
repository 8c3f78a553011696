"""What commands print: JSON, aligned tables, numbers people can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """``value`` (plain JSON values) as indented JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned with spaces; numbers to the right, the last column as long as it likes."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    columns = [[row[i] for row in rows] for i in range(len(headers))]
    right = [bool(rows) and all(isinstance(value, (int, float)) for value in column) for column in columns]

    def line(values: Sequence[str]) -> str:
        parts = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), *(line(row) for row in cells)])


def billions(count: int | None) -> str:
    """A parameter count as people write it: ``46.703 B``, ``3.412 M``; ``unknown`` for None."""
    if count is None:
        return "unknown"
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:.3f} {unit}"
    return str(count)


def gibibytes(count: int) -> str:
    """Bytes as GiB with one digit."""
    return f"{count / 2**30:.1f} GiB"
