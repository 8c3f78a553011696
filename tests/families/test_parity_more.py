"""The second half of the families of every run (see test_parity.py)."""

from __future__ import annotations

import pytest

from tests.helpers.families import check_family


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
        ("gpt_oss", "GptOssForCausalLM"),
        ("switch_transformers", "SwitchTransformersForConditionalGeneration"),
    ],
)
def test_parity(name: str, model_class: str) -> None:
    check_family(name, model_class)
