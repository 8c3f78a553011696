"""Quantised checkpoints as published: read as the float checkpoint that they stand for, or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moe_export.errors import SourceError, UnsupportedModelError
from moe_export.importer.checkpoint import inspect_checkpoint
from moe_export.importer.quantized import QuantizedWeights
from moe_export.importer.quantized_config import expansion, read_quantization
from moe_export.importer.sources import load_source
from moe_export.models.families import FAMILIES
from moe_export.models.families.tiny import build_tiny
from tests.helpers import published
from tests.helpers.published import Format, publish

CONFIG = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


def saved(family: str, folder: Path, **sizes: Any) -> None:
    entry = FAMILIES[family]
    build_tiny(dataclasses.replace(entry, tiny={**entry.tiny, **sizes})).save_pretrained(folder)


PUBLISHED = [
    ("deepseek_v3", published.fp8(), {}),
    ("gpt_oss", published.mxfp4(), {"intermediate_size": 64}),
    ("qwen3_moe", published.gptq(desc_act=True), {}),
    ("mixtral", published.awq(), {}),
    ("qwen3_moe", published.fp8((16, 24), "bfloat16"), {}),
    ("mixtral", published.fp8(None), {}),
    ("mixtral", published.fp8((32, 8), "e8m0"), {}),
    ("mixtral", published.gptq(8, -1, version="gptq_v2"), {}),
]


@pytest.mark.parametrize(("family", "form", "sizes"), PUBLISHED)
def test_a_loaded_model_has_the_published_values(
    family: str, form: Format, sizes: dict[str, Any], tmp_path: Path
) -> None:
    """Every weight equals, to the last bit, the one of a float checkpoint with the same values."""
    saved(family, tmp_path / "source", **sizes)
    names = publish(tmp_path / "source", tmp_path / "quantised", tmp_path / "floats", form, shards=3)
    assert names
    got, wanted = load_source(tmp_path / "quantised"), load_source(tmp_path / "floats")
    assert got.quantized is not None and got.quantized.tensors == len(names)
    assert got.stored is None and wanted.quantized is None
    weights = got.module.state_dict()
    assert set(weights) == set(wanted.module.state_dict())
    for name, value in wanted.module.state_dict().items():
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], value), name
    tokens = torch.arange(6).view(1, 6)
    with torch.no_grad():
        assert torch.equal(got.module(tokens).logits, wanted.module(tokens).logits)
    assert not hasattr(got.module.config, "quantization_config")


def test_tensors_that_were_left_as_floats_are_read_as_such(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "source")
    form = dataclasses.replace(published.awq(), wanted=r"experts\.\d\.w[13]\.weight$")
    names = publish(tmp_path / "source", tmp_path / "quantised", tmp_path / "floats", form)
    info = inspect_checkpoint(tmp_path / "quantised")
    assert set(info.quantized) == set(names) and len(names) == 16
    got, wanted = load_source(tmp_path / "quantised").module, load_source(tmp_path / "floats").module
    for name, value in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


def test_generation_settings_are_those_of_the_folder(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "source")
    publish(tmp_path / "source", tmp_path / "q", tmp_path / "floats", published.awq())
    (tmp_path / "q" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    text = load_source(tmp_path / "q").text
    assert text is not None and text.eos_token_ids == (7, 9)
    (tmp_path / "q" / "generation_config.json").write_text("{")
    with pytest.raises(SourceError, match="generation_config.json: transformers cannot read it"):
        load_source(tmp_path / "q")


def test_counts_of_what_is_quantised(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    folder = write(tmp_path, published.gptq(), "x.weight", matrix)
    found = QuantizedWeights.of(inspect_checkpoint(folder))
    words, groups = 16 * 32 // 8, 4
    nbytes = 4 * words + groups * 16 * 2 + groups * 16 // 2 + 32 * 4
    assert found == QuantizedWeights("GPTQ int4", 1, nbytes, 512, 2048)
    assert found.written_bytes("float32") == 2048 and found.written_bytes("bfloat16") == 1024
    assert expansion(folder) == 4
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert expansion(folder) == 1
    (folder / "config.json").write_text("[")
    assert expansion(folder) == 1


Change = Callable[[dict[str, Any]], Any]


def write(folder: Path, form: Format, name: str, matrix: Any, change: Change | None = None) -> Path:
    """A checkpoint of one quantised matrix and a float vector."""
    tensors, _ = form.write(name, matrix)
    if change is not None:
        change(tensors)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": form.config}))
    save_file({**tensors, "norm.weight": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


def drop(name: str) -> Change:
    return lambda t: t.pop(name)


def put(name: str, tensor: Any) -> Change:
    return lambda t: t.update({name: tensor})


GPTQ, AWQ, FP8, MXFP4 = published.gptq(), published.awq(), published.fp8(), published.mxfp4()


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (FP8, drop("w_scale_inv"), "'w' is quantised and 'w_scale_inv', which it is scaled by, is missing"),
        (FP8, drop("w"), "'w_scale_inv' scales no quantised weight"),
        (FP8, put("w", np.ones((16, 32), np.float32)), "'w_scale_inv' scales no quantised weight"),
        (FP8, put("w_scale_inv", np.ones((2, 2), np.float32)), r"shape \[2, 2\], expected \[1, 2\] \(FP8 in"),
        (FP8, put("w_scale_inv", np.ones((1, 2), np.uint8)), "'w_scale_inv' is U8, expected F32, BF16"),
        (FP8, put("w", np.ones(4, ml_dtypes.float8_e4m3fn)), r"'w' of shape \[4\] is no matrix"),
        (published.fp8(None), put("w_scale_inv", np.ones(2, np.float32)), r"shape \[2\], expected \[\]"),
        (MXFP4, drop("w_scales"), "'w_blocks' is quantised and 'w_scales', which"),
        (MXFP4, drop("w_blocks"), "'w_scales' scales no quantised weight"),
        (MXFP4, put("w", np.ones((1, 64, 8), np.float32)), "holds 'w' and its quantised form 'w_blocks'"),
        (MXFP4, put("w_scales", np.ones((1, 8, 3), np.uint8)), r"shape \[1, 8, 3\], expected \[1, 8, 2\]"),
        (MXFP4, put("w_scales", np.ones((1, 8, 2), np.float32)), "'w_scales' is F32, expected U8"),
        (MXFP4, put("w_blocks", np.ones((1, 8, 2, 8), np.uint8)), "expected U8 and 16 bytes per block"),
        (GPTQ, drop("w.qzeros"), "'w.qweight' is quantised and 'w.qzeros', which"),
        (GPTQ, drop("w.scales"), "'w.qweight' is quantised and 'w.scales', which"),
        (GPTQ, drop("w.qweight"), "'w.(qzeros|scales)' scales no quantised weight"),
        (GPTQ, put("w.qweight", np.ones((4, 16), np.int64)), "'w.qweight' is no matrix of I32"),
        (GPTQ, put("w.qweight", np.ones((8, 16), np.int32)), r"'w.qzeros' has the shape \[4, 2\], exp.* \[8"),
        (GPTQ, put("w.g_idx", np.zeros(31, np.int32)), r"'w.g_idx' has the shape \[31\], expected \[32\]"),
        (GPTQ, put("w.g_idx", np.zeros(32, np.int64)), "'w.g_idx' is I64, expected I32"),
        (GPTQ, put("w.scales", np.zeros((4, 16), np.int32)), "'w.scales' is I32, expected F16 or BF16"),
        (GPTQ, put("w.weight", np.zeros((16, 32), np.float32)), "holds 'w.weight' and its quantised form"),
        (AWQ, drop("w.scales"), "'w.qweight' is quantised and 'w.scales', which"),
        (AWQ, put("w.qweight", np.ones((36, 2), np.int32)), r"'w.qzeros' has the shape \[4, 2\], exp.* \[5"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    form: Format, change: Change, message: str, tmp_path: Path
) -> None:
    shape = (1, 64, 8) if form is MXFP4 else (16, 32)
    name = "w.weight" if form in (GPTQ, AWQ) else "w"
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    inspect_checkpoint(write(tmp_path, form, name, matrix))
    write(tmp_path, form, name, matrix, change)
    with pytest.raises(SourceError, match=message):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not read, only e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\] is not two sizes"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits 3 are not read, only 2, 4 and 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0 is neither a size nor -1"),
        ({"quant_method": "gptq", "bits": 4}, "group_size None"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin' is not read",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemv"}, "version 'gemv' is not"),
        ({"quant_method": "awq", "bits": 8, "group_size": 8}, "bits 8 are not read, only 4"),
    ],
)
def test_variants_that_are_not_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^config.json: quantization_config: {message}"):
        read_quantization(Path("config.json"), {"quantization_config": fields})


def test_parts_of_a_model_must_be_quantised_alike() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    whole = {"quantization_config": fp8}
    for config in (whole, {"text_config": whole}, {**whole, "text_config": whole}):
        found = read_quantization(Path("c"), config)
        assert found is not None and found.block == (128, 128)
    with pytest.raises(UnsupportedModelError, match="in different ways"):
        read_quantization(
            Path("c"),
            {"quantization_config": fp8, "text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
        )


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("w", np.ones((2, 2), ml_dtypes.float8_e4m3fn)), ("w.qweight", np.ones((2, 2), np.int32))],
)
def test_quantised_tensors_without_a_word_in_the_config(name: str, tensor: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: tensor}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"tensor '{name}' is .*no quantization_config"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": {"quant_method": "mxfp4"}})
    )
    with pytest.raises(UnsupportedModelError, match=f"tensor '{name}' is .*does not say how to scale it"):
        inspect_checkpoint(tmp_path)


def test_values_that_make_no_sense_are_named_when_they_are_read(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "source")
    publish(tmp_path / "source", tmp_path / "q", tmp_path / "floats", published.gptq())
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w2"
    tensors[f"{name}.g_idx"][3] = 99
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=f"'{name}.qweight': g_idx puts input 3 into group 99"):
        load_source(tmp_path / "q")
    saved("gpt_oss", tmp_path / "oss", intermediate_size=64)
    publish(tmp_path / "oss", tmp_path / "q2", tmp_path / "floats2", published.mxfp4())
    tensors = load_file(tmp_path / "q2" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}_scales"][1, 2, 0] = 255
    save_file(tensors, tmp_path / "q2" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=f"'{name}_blocks': 32 values are NaN or infinite .*_scales'"):
        load_source(tmp_path / "q2")


def test_a_quantised_matrix_of_another_size_is_named(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "source")
    publish(tmp_path / "source", tmp_path / "q", tmp_path / "floats", published.gptq(group=-1))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"qzeros' has the shape \[1, \d+\], expected .*GPTQ int8"):
        load_source(tmp_path / "q")
