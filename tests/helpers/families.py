"""The tools that measure families and write their page, as modules."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def tool(name: str) -> ModuleType:
    """``tools/<name>.py``, imported once."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check_family(name: str, model_class: str) -> None:
    """Build, run and compare ``model_class`` of the family; fail with every problem found."""
    row = tool("measure_families").measure(name, model_class)
    assert not row.problems, "\n".join(row.problems)
    assert set(row.max_error) == {"portable", "onnxruntime"}


def classes(families) -> list[tuple[str, str]]:
    """(family, class) of every class of ``families`` that is not refused."""
    return [(f.name, cls) for f in families if f.status != "refused" for cls in f.classes]
