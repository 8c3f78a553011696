"""Bundles shared by the runtime's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_export.runtime.session import Session, load
from tests.helpers.tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[Session]:
    with load(tiny_path, threads=1) as session:
        yield session


@pytest.fixture(scope="session")
def batch() -> dict[str, np.ndarray]:
    """Three sequences of 11 tokens; the second is padded on the left by four."""
    ids = np.random.default_rng(1).integers(0, 256, (3, 11))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}
