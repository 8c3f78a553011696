"""What config.json says without its class: the number of experts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from moe_export.importer.checkpoint import (
    experts_in_config,
)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_local_experts": 8}, 8),
        ({"num_experts": 60}, 60),
        ({"n_routed_experts": 256, "n_shared_experts": 1}, 256),
        ({"moe_num_experts": 64}, 64),
        ({"num_experts": [1, 8, 16]}, 16),
        ({"text_config": {"num_experts": 4}}, 4),
        ({"vision_config": {"num_local_experts": 60}, "text_config": {"n_routed_experts": 4}}, 4),
        ({"talker_config": {"num_experts": 2}, "thinker_config": {"text_config": {"num_experts": 4}}}, 4),
        ({"ffn_config": {"moe_num_experts": 16}}, 16),
        ({"own": {"num_experts": 3}}, 3),
        ({"vision_config": {"num_experts": 3}}, 3),
        ({}, None),
        ({"num_experts": None}, None),
        ({"num_experts": 0}, None),
        ({"num_experts": 1}, None),
        ({"num_experts": "8"}, None),
        ({"num_experts": True}, None),
        ({"num_experts": []}, None),
        ({"num_experts_per_tok": 2, "n_shared_experts": 2}, None),
        ({"is_moe": False, "num_experts": 16384}, None),
        ({"is_moe": True, "num_experts": 16384}, 16384),
        ({"text_config": {"enable_moe_block": False, "num_experts": 4}}, None),
        ({"quantization_config": {"num_experts": 4}}, None),
    ],
)
def test_experts_in_config(config: dict[str, Any], count: int | None) -> None:
    assert experts_in_config(config) == count


def test_experts_in_every_config_of_transformers() -> None:
    """Each config class that has a field with the number of experts is read rightly at its defaults."""
    import logging

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.disable(logging.WARNING)
    expected = {
        "mixtral": 8,
        "qwen2_moe": 60,
        "qwen3_moe": 128,
        "deepseek_v2": 64,
        "deepseek_v3": 256,
        "gpt_oss": 128,
        "olmoe": 64,
        "phimoe": 16,
        "glm4_moe": 128,
        "granitemoe": 8,
        "llama4": 16,
        "switch_transformers": 8,
        "nllb-moe": 128,
        "jamba": 16,
        "dbrx": 4,
        "aria": 8,
        "ernie4_5_vl_moe": 64,
        "qwen3_omni_moe": 128,
        "dots3_note": 256,
        "longcat_flash": 512,
        "doge": None,
        "gemma4": None,
        "vitpose": None,
        "hunyuan_v1_moe": None,
        "llama": None,
        "bert": None,
        "t5": None,
    }
    try:
        found = {name: experts_in_config(CONFIG_MAPPING[name]().to_dict()) for name in expected}
        assert found == expected
        from moe_export.importer.config_facts import _EXPERT_KEYS

        counted = set()
        for name in CONFIG_MAPPING:
            module = sys.modules[CONFIG_MAPPING[name].__module__].__file__
            assert module is not None
            for line in Path(module).read_text().splitlines():
                field = line.strip().partition(":")[0]
                if (
                    line.startswith("    ")
                    and ":" in line
                    and field.isidentifier()
                    and field.endswith("experts")
                ):
                    counted.add(field)
        others = {field for field in counted if "shared" in field}
        assert counted - others - {"top_k_experts"} == set(_EXPERT_KEYS)
    finally:
        logging.disable(logging.NOTSET)
