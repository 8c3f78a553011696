"""PhiMoE's long RoPE, as the published Phi-3.5-MoE uses it: the scale depends on the longest position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moe_export
from moe_export.models.patches.phimoe import patch

ORIGINAL = 16
"""Positions up to which the short scale holds."""


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import PhimoeConfig, PhimoeForCausalLM

    factors = np.linspace(1.0, 2.0, 4).tolist()
    config = PhimoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": [2 * f for f in factors],
            "short_mscale": 1.25,
            "long_mscale": 1.5,
            "original_max_position_embeddings": ORIGINAL,
        },
    )
    torch.manual_seed(0)
    return PhimoeForCausalLM(config).eval()


def test_the_patch_computes_what_the_model_does(model: torch.nn.Module) -> None:
    rotary = model.model.rotary_emb
    hidden = torch.zeros(1, 1, 32)
    positions = [torch.arange(n)[None] for n in (1, ORIGINAL, ORIGINAL + 1, 40)]
    expected = [rotary(hidden, p) for p in positions]
    with patch(model):
        got = [rotary(hidden, p) for p in positions]
    assert "forward" not in vars(rotary)
    for want, have in zip(expected, got, strict=True):
        assert torch.equal(want[0], have[0]) and torch.equal(want[1], have[1])
    assert not torch.equal(expected[1][0][0, 5], expected[2][0][0, 5]), "one scale"


def test_an_engine_on_both_sides_of_the_original_length(model: torch.nn.Module, tmp_path: Path) -> None:
    moe_export.build(model, tmp_path / "b", verify=False, bench=False, threads=1)
    with moe_export.load(tmp_path / "b") as session:
        for length in (5, ORIGINAL, ORIGINAL + 1, 40):
            ids = np.random.default_rng(length).integers(3, 100, (2, length))
            with torch.no_grad():
                want = model(input_ids=torch.from_numpy(ids)).logits.numpy()
            got = session.run({"input_ids": ids})["logits"]
            assert np.abs(got - want).max() <= 1e-5 * max(1.0, float(np.abs(want).max())), length
