"""Hidden states from a model that has a language-model head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moe_export
from moe_export.importer.sources import load_source
from moe_export.models.families import tiny_model
from moe_export.models.reference import ReferenceModel


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        pytest.param("switch_transformers", marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", marks=pytest.mark.slow),
    ],
)
def test_feature_extraction_leaves_the_head_out(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    options = {"task": "feature-extraction", "verify": False, "bench": False, "threads": 1}
    moe_export.build(model, tmp_path / "engine", **options)
    ids = np.random.default_rng(0).integers(3, 100, (2, 13))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = ReferenceModel(load_source(model, task="feature-extraction")).run(inputs).outputs
    with moe_export.load(tmp_path / "engine") as session:
        assert not session.io.cache_inputs
        got = session.run(inputs)
    assert list(got) == list(expected) == ["last_hidden_state"]
    error = np.abs(expected["last_hidden_state"] - got["last_hidden_state"])[mask.astype(bool)]
    assert error.max() <= 1e-5
