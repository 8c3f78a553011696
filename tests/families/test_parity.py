"""A few families, one of each kind, in every run; all of them in the slow tests beside this file."""

from __future__ import annotations

import pytest

from moe_export.models.families.others import OTHERS
from tests.helpers.families import check_family, classes


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("mixtral", "MixtralForCausalLM"),
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        ("lfm2_moe", "Lfm2MoeForCausalLM"),
    ],
)
def test_parity(name: str, model_class: str) -> None:
    check_family(name, model_class)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model_class"), classes(OTHERS))
def test_parity_of_encoder_decoders(name: str, model_class: str) -> None:
    check_family(name, model_class)
