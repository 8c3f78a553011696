"""Counts from configs alone against the transformers classes themselves, built on the meta device."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_export.errors import SourceError, UnsupportedModelError, UsageError
from moe_export.inspect import find_expert_blocks, inspect_model, inspect_path
from moe_export.inspect.architecture import Architecture, Attention, Linear, MoE
from moe_export.inspect.config_readers import read_architecture
from moe_export.inspect.config_summary import describe
from moe_export.inspect.presets import presets
from moe_export.inspect.summary import meta_model, read_config

TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
MLA: dict[str, Any] = {
    **TINY, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "n_group": 2, "topk_group": 1,
}  # fmt: skip
QWEN: dict[str, Any] = {**TINY, "moe_intermediate_size": 24, "num_experts": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, biases": {"model_type": "llama", **TINY, "attention_bias": True, "mlp_bias": True},
    "llama, tied, wide heads": {"model_type": "llama", **TINY, "tie_word_embeddings": True, "head_dim": 16},
    "mistral, default window": {"model_type": "mistral", **TINY},
    "mixtral, window": {"model_type": "mixtral", **TINY, "num_local_experts": 5, "sliding_window": 7},
    "phimoe, no bias": {"model_type": "phimoe", **TINY, "num_local_experts": 4},
    "phimoe, biases": {
        "model_type": "phimoe", **TINY, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True,
        "tie_word_embeddings": True,
    },
    "granitemoe, untied": {"model_type": "granitemoe", **TINY, "num_local_experts": 4},
    "olmoe, grouped": {"model_type": "olmoe", **TINY, "num_experts": 8, "attention_bias": True},
    "qwen2_moe, every other layer": {
        "model_type": "qwen2_moe", **QWEN, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2,
        "qkv_bias": False,
    },
    "qwen3_moe, dense layers": {
        "model_type": "qwen3_moe", **QWEN, "mlp_only_layers": [0, 2], "attention_bias": True, "head_dim": 16,
    },
    "gpt_oss, no bias": {
        "model_type": "gpt_oss", **TINY, "num_local_experts": 4, "attention_bias": False, "head_dim": 8,
    },
    "glm4_moe, norms": {
        "model_type": "glm4_moe", **{k: v for k, v in MLA.items() if "lora" not in k}, "use_qk_norm": True,
    },
    "deepseek_v2, no query rank": {"model_type": "deepseek_v2", **MLA},
    "deepseek_v3, biases": {"model_type": "deepseek_v3", **MLA, "q_lora_rank": 20, "attention_bias": True},
    "llama4_text, interleaved": {
        "model_type": "llama4_text", **TINY, "intermediate_size_mlp": 64, "num_local_experts": 4,
        "interleave_moe_layer_step": 2, "num_experts_per_tok": 1, "head_dim": 8,
    },
    "qwen3_next": {
        "model_type": "qwen3_next", **QWEN, "shared_expert_intermediate_size": 20, "head_dim": 16,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3, "full_attention_interval": 2,
    },
    "switch, untied, three sparse": {
        "model_type": "switch_transformers", "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48,
        "num_layers": 6, "num_decoder_layers": 4, "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 0, "num_heads": 4, "num_experts": 5, "router_bias": True,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def components_of(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of a built model by component, told by the names of its modules."""
    experts = tuple(f"{block.name}." for block in find_expert_blocks(model))
    counts: Counter[str] = Counter()
    words = (
        ("vision", ("vision", "multi_modal")),
        ("shared_experts", ("shared_expert",)),
        ("norms", ("norm",)),
        ("output_head", ("lm_head",)),
        ("embeddings", ("embed_tokens", "shared.weight")),
        ("router", (".gate.", "router")),
        ("attention", ("attn", "attention")),
        ("dense_layers", ("mlp", "feed_forward")),
    )
    for name, parameter in model.named_parameters():
        if name.startswith(experts):
            counts["routed_experts"] += parameter.numel()
            continue
        part = next(part for part, found in words if any(w in name.lower() for w in found))
        counts[part] += parameter.numel()
    return dict(counts)


def check(values: dict[str, Any], folder: Path) -> None:
    """The config's architecture has the parameters, by component, and the MoE layers of the built model."""
    arch = read_architecture(values, "config")
    known = {**values, "model_type": "deepseek_v3"} if values["model_type"] == "kimi_k2" else values
    (folder / "config.json").write_text(json.dumps(known))
    model = meta_model(read_config(folder))
    assert {k: v for k, v in arch.parameters().items() if v} == components_of(model)
    built = inspect_model(model)
    assert [
        (m.name, m.num_experts, m.top_k, m.hidden_size, m.intermediate_size, m.shared_experts, m.routing)
        for m in built.moe_layers
    ] == [
        (m.name, m.experts, m.top_k, arch.hidden, m.intermediate, m.shared_experts, m.routing)
        for m in arch.moe_layers
    ]
    assert arch.class_name == built.class_name
    active = sum(arch.active_parameters().values())
    assert active == (built.parameters["active"] or 0) - arch.vision


@pytest.mark.parametrize("name", presets())
def test_presets_are_the_models_that_transformers_builds(name: str, tmp_path: Path) -> None:
    values = dict(presets()[name].config)
    if name.startswith("switch"):  # a module per expert: few experts, and two layers a stack, are enough
        sparse = 2 if name == "switch-c-2048" else 1
        values["num_experts"] = 16
        values |= dict.fromkeys(("num_layers", "num_decoder_layers"), 2)
        values |= dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), sparse)
    check(values, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_options_of_the_families(name: str, tmp_path: Path) -> None:
    check(VARIANTS[name], tmp_path)


@pytest.mark.parametrize(
    "model_type", sorted({str(p.config["model_type"]) for p in presets().values()} - {"kimi_k2", "llama4"})
)
def test_fields_left_out_have_the_defaults_of_transformers(model_type: str, tmp_path: Path) -> None:
    needed = {"deepseek_v2": {"num_experts_per_tok": 2}}.get(model_type, {})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **needed}))
    summary = inspect_path(tmp_path)
    built = inspect_model(meta_model(read_config(tmp_path)))
    assert summary.parameters["total"] == built.parameters["total"]
    assert summary.parameters["active"] == built.parameters["active"]
    assert summary.needs["kv_cache"]["bytes_per_token"] > 0


def test_another_head_is_built_not_guessed(tmp_path: Path) -> None:
    values = {
        **VARIANTS["mixtral, window"],
        "architectures": ["MixtralForSequenceClassification"],
        "num_labels": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    summary = inspect_path(tmp_path)
    assert summary.class_name == "MixtralForSequenceClassification"
    arch = read_architecture(values, "config")
    assert summary.parameters["total"] == sum(arch.parameters().values()) - 96 * 32 + 3 * 32


def test_a_family_without_reader_is_counted_and_says_what_is_unknown(tmp_path: Path) -> None:
    values = {"model_type": "jamba", **TINY, "num_experts": 4, "mamba_d_state": 8}
    (tmp_path / "config.json").write_text(json.dumps(values))
    summary = inspect_path(tmp_path)
    assert summary.parameters["active"]
    assert summary.needs["weights_bytes"]["bfloat16"] == 2 * summary.parameters["total"]
    assert "kv_cache" not in summary.needs
    assert any("jamba" in note and "not derived" in note for note in summary.notes)
    with pytest.raises(UnsupportedModelError, match=r"'jamba'.*choices: .*mixtral"):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": "wide"}, "'hidden_size' is 'wide'; expected a whole number"),
        ({"num_local_experts": 0}, "'num_local_experts' is 0; expected a whole number of at least 1"),
        ({"num_experts_per_tok": 9}, "9 of 5 experts per token: expected 1 to 5"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no'; expected true or false"),
        ({"num_attention_heads": True}, "'num_attention_heads' is True"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**VARIANTS["mixtral, window"], **change}))
    with pytest.raises(SourceError, match=match) as caught:
        inspect_path(tmp_path)
    assert "config.json" in str(caught.value)


def test_a_config_file_is_enough_and_a_path_wins_over_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mixtral-8x7b").mkdir()
    file = tmp_path / "mixtral-8x7b" / "config.json"
    file.write_text(json.dumps(VARIANTS["mixtral, window"]))
    monkeypatch.chdir(tmp_path)
    small = inspect_path("mixtral-8x7b").parameters["total"]
    assert small == inspect_path(file).parameters["total"]
    assert small is not None and small < 10**6
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no config\.json there"):
        describe(tmp_path / "empty")


def test_weight_files_are_counted_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["mixtral, window"]))
    assert inspect_path(tmp_path).details == {}
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"not a safetensors file")
    assert inspect_path(tmp_path).details == {"weight_files": 2, "weight_bytes": 44}


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "float8"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        (None, "float16"),
    ],
)
def test_the_checkpoints_own_format(tmp_path: Path, config: dict[str, Any] | None, weights: str) -> None:
    values = {**VARIANTS["mixtral, window"], "dtype": "float16", "quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert describe(tmp_path).weights == weights


@pytest.mark.parametrize(
    "name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "switch-base-8", "llama-4-maverick"]
)
def test_dense_models_of_the_same_size(name: str) -> None:
    arch = presets()[name].architecture
    for which, counts in (("active", arch.active_parameters()), ("total", arch.parameters())):
        dense = arch.dense_like(which)
        assert dense.moe_layers == ()
        wanted = sum(counts.values()) - counts["router"] + (arch.vision if which == "active" else 0)
        assert sum(dense.parameters().values()) == pytest.approx(wanted, rel=1e-3)
        assert dense.cache_elements(100) == arch.cache_elements(100)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(UsageError, match="sizes of 1 or more"):
        Linear(0, 4)
    with pytest.raises(UsageError, match="without a window"):
        Attention("sliding", (), 1, 1, 8, 8)
    with pytest.raises(UsageError, match="expected 1 to 4"):
        MoE(4, 5, (Linear(2, 2),), 2, ())
    with pytest.raises(UsageError, match="without layers"):
        Architecture("x", "X", "float32", 8, 2, (), Linear(2, 8), False, 2, None)
