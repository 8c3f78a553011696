"""Measures a family as ``tools/measure_families.py`` does, and fails with what it finds."""

from __future__ import annotations

from tests.helpers.tools import tool


def check_family(name: str, model_class: str) -> None:
    """Build, run and compare ``model_class`` of the family; fail with every problem found."""
    row = tool("measure_families").measure(name, model_class)
    assert not row.problems, "\n".join(row.problems)
    assert set(row.max_error) == {"portable", "onnxruntime"}


def classes(families) -> list[tuple[str, str]]:
    """(family, class) of every class of ``families`` that is not refused."""
    return [(f.name, cls) for f in families if f.status != "refused" for cls in f.classes]
