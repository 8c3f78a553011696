"""Measures a family as ``tools/measure_families.py`` does, and fails with what it finds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.tools import tool

LONGEST = ("dots3_note", "glm5_next", "hy_v4", "inkling2", "zaya")
"""Families that take half a minute each."""


def check_family(name: str, model_class: str) -> None:
    """Build, run and compare ``model_class`` of the family; fail with every problem found."""
    row = tool("measure_families").measure(name, model_class)
    assert not row.problems, "\n".join(row.problems)
    assert set(row.max_error) == {"portable", "onnxruntime"}


def classes(families: Any) -> list[Any]:
    """(family, class) of every class of ``families`` that is not refused; the longest are nightly."""
    return [
        pytest.param(f.name, cls, marks=pytest.mark.nightly if f.name in LONGEST else ())
        for f in families
        if f.status != "refused"
        for cls in f.classes
    ]
