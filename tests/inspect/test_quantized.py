"""Quantised checkpoints are counted as the float models that they stand for, with the memory they take."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moe_export.cli.inspect_text import summary_text
from moe_export.inspect import inspect_path
from moe_export.inspect.config_summary import describe
from moe_export.models.families import FAMILIES
from moe_export.models.families.tiny import build_tiny
from tests.helpers import published
from tests.helpers.published import Format, publish


@pytest.mark.parametrize(
    ("family", "form", "sizes", "text", "weights"),
    [
        ("mixtral", published.gptq(), {}, "GPTQ int4", "int4"),
        ("mixtral", published.gptq(8), {}, "GPTQ int8", "int8"),
        ("mixtral", published.awq(), {}, "AWQ int4", "int4"),
        ("gpt_oss", published.mxfp4(), {"intermediate_size": 64}, "MXFP4", "mxfp4"),
        ("deepseek_v3", published.fp8((16, 24)), {}, "FP8 in blocks of 16 x 24", "float8"),
        ("dots1", published.gptq(), {}, "GPTQ int4", None),
    ],
)
def test_parameters_and_files(
    family: str, form: Format, sizes: dict[str, Any], text: str, weights: str | None, tmp_path: Path
) -> None:
    """``dots1`` has no reader: its class is built."""
    entry = FAMILIES[family]
    model = build_tiny(dataclasses.replace(entry, tiny={**entry.tiny, **sizes}))
    model.save_pretrained(tmp_path / "source")
    publish(tmp_path / "source", tmp_path / "quantised", tmp_path / "floats", form, shards=2)
    got, wanted = inspect_path(tmp_path / "quantised"), inspect_path(tmp_path / "floats")
    assert got.parameters == wanted.parameters
    assert got.parameters["total"] == sum(p.numel() for p in model.parameters())
    size = sum(f.stat().st_size for f in (tmp_path / "quantised").glob("*.safetensors"))
    assert got.details == {"weight_files": 2, "weight_bytes": size, "quantization": text}
    assert "quantization" not in wanted.details
    assert got.needs.get("weights") == weights
    assert f"weights quantised: {text};" in summary_text(got)
    assert "quantised" not in summary_text(wanted)


def test_a_quantisation_that_is_not_read_is_said(tmp_path: Path) -> None:
    config = {**FAMILIES["mixtral"].tiny, "model_type": "mixtral", "num_hidden_layers": 2}
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    summary = inspect_path(tmp_path)
    assert summary.details == {"quantization": "in a way that is not read"}
    assert any("(compressed-tensors), moe-export reads float weights and fp8" in n for n in summary.notes)
    config["quantization_config"] = None
    config["text_config"] = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(tmp_path).weights == "mxfp4"
