"""The shipped examples; ``tools`` on the import path, because its scripts import one another by name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="session")
def byte_mixtral() -> Path:
    return ROOT / "examples" / "byte-mixtral"


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """Import ``examples/<name>/model.py``."""

    def load(name: str) -> ModuleType:
        key = f"example_{name}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, ROOT / "examples" / name / "model.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module
            spec.loader.exec_module(module)
        return sys.modules[key]

    return load
