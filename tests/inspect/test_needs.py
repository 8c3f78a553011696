"""Memory, cache, work per token: against transformers' own caches and arithmetic, and published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_export.costs import FORMATS, GPUS, Assumptions, Popularity, weight_format
from moe_export.errors import UsageError
from moe_export.inspect import inspect_path
from moe_export.inspect.config_readers import read_architecture
from moe_export.inspect.model_costs import Step, expert_kernels, shared_kernels
from moe_export.inspect.needs import Workload, cache_facts, context_note, gpus_needed, needs, rank_bytes
from moe_export.inspect.presets import get_preset
from tests.inspect.test_architecture import VARIANTS

BF16 = weight_format("bfloat16")
# Families whose cache or arithmetic has a form of its own, each small enough to run.
RUN = (
    "llama, biases",
    "qwen3_moe, dense layers",
    "deepseek_v3, biases",
    "deepseek_v2, no query rank",
    "qwen3_next",
)


def _model(values: dict[str, Any], folder: Path, **extra: Any) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps({**values, **extra}))
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", RUN)
def test_cache_is_what_transformers_keeps(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = _model(VARIANTS[name], tmp_path)
    tokens = 11
    with torch.no_grad():
        cache = model(torch.randint(0, 90, (1, tokens)), use_cache=True).past_key_values
    kept = 0
    for layer in cache.layers:
        for tensor in (
            getattr(layer, n, None) for n in ("keys", "values", "conv_states", "recurrent_states")
        ):
            for part in tensor.values() if isinstance(tensor, dict) else [tensor]:
                kept += 0 if part is None else part.numel()
    assert read_architecture(VARIANTS[name], "config").cache_elements(tokens) == kept


@pytest.mark.parametrize("name", ["llama, biases", "qwen3_moe, dense layers", "deepseek_v3, biases"])
def test_arithmetic_is_what_torch_counts(name: str, tmp_path: Path) -> None:
    """Multiply-adds of matrices at prefill; torch's eager attention also does the masked half."""
    torch.set_num_threads(1)
    values = VARIANTS[name]
    model = _model(values, tmp_path, experts_implementation="eager")
    tokens = 12
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 90, (1, tokens)), use_cache=False, logits_to_keep=1)
    arch = read_architecture(values, "config")
    step = Step("prefill", 1, tokens)
    ours = 0.0
    for kernels in (*shared_kernels(arch, step, BF16, 2), *expert_kernels(arch, step, BF16)):
        # Norms, gathers and additions are counted by us and not by torch.
        extra = kernels.work.activations / 2 if kernels.part == "norms" else 0.0
        ours += (kernels.work.flops - extra) * kernels.count
    whole = sum(2 * a.heads * (a.qk_dim + a.v_dim) * tokens**2 for x in arch.layers for a in x.attentions)
    causal = sum(a.prefill_flops(tokens) for x in arch.layers for a in x.attentions)
    elementwise = 2 * arch.hidden  # around the output head
    elementwise += sum(tokens * (2 * m.experts + arch.hidden * (2 + 2 * m.top_k)) for m in arch.moe_layers)
    assert ours - causal + whole - elementwise == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_published_cache_sizes() -> None:
    """Bytes per token in bfloat16; "Insights into DeepSeek-V3", arXiv 2505.09343, table 1: 70.272 KB."""
    assert inspect_path("deepseek-v3").needs["kv_cache"]["bytes_per_token"] == 70_272
    assert inspect_path("llama-2-70b").needs["kv_cache"]["bytes_per_token"] == 2 * 80 * 8 * 128 * 2


def test_published_training_arithmetic() -> None:
    """The same paper, table 2: training takes 250 GFLOP per token at 4096 tokens, 3 forward passes."""
    work = inspect_path("deepseek-v3", context=4096).needs["per_token"]["prefill"]
    assert 3 * work["flops"] / 1e9 == pytest.approx(250, rel=0.03)


def test_windows_stop_the_cache() -> None:
    mistral = get_preset("mistral-7b").architecture
    assert mistral.cache_elements(4096) == mistral.cache_elements(30000) == 2 * 32 * 8 * 128 * 4096
    oss = get_preset("gpt-oss-20b").architecture  # every other layer sees 128 tokens
    assert oss.cache_elements(1000) == 12 * 2 * 8 * 64 * (1000 + 128)
    scout = get_preset("llama-4-scout").architecture  # three of four layers see their chunk of 8192 tokens
    assert scout.cache_elements(100_000) == 2 * 8 * 128 * (12 * 100_000 + 36 * 8192)
    facts = cache_facts(oss, Workload(BF16, "float8", 1000, 3))
    assert facts["layers"] == {"sliding (128 tokens)": 12, "full": 12}
    assert facts["bytes"] == 3 * 12 * 2 * 8 * 64 * 1128


def test_linear_attention_keeps_a_state_of_fixed_size() -> None:
    arch = get_preset("qwen3-next-80b-a3b").architecture
    facts = cache_facts(arch, Workload(BF16, "bfloat16", 1000, 1))
    assert facts["layers"] == {"linear": 36, "full": 12}
    assert facts["bytes_per_token"] == 12 * 2 * 2 * 256 * 2
    assert facts["fixed_bytes_per_sequence"] == 36 * (32 * 128 * 128 + 8192 * 4) * 2
    assert facts["bytes"] == 1000 * facts["bytes_per_token"] + facts["fixed_bytes_per_sequence"]


def test_latent_cache_is_small_and_says_so() -> None:
    facts = cache_facts(get_preset("deepseek-v3").architecture, Workload(BF16))
    assert facts["expanded_bytes_per_token"] == 61 * 128 * (192 + 128) * 2
    assert facts["bytes_per_token"] * 71 < facts["expanded_bytes_per_token"]
    assert "expanded_bytes_per_token" not in cache_facts(
        get_preset("mixtral-8x7b").architecture, Workload(BF16)
    )


@pytest.mark.parametrize(("kind", "window"), [("sliding", 5), ("chunked", 5), ("full", None)])
@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 13])
def test_prefill_pairs_by_brute_force(kind: Any, window: int | None, tokens: int) -> None:
    from moe_export.inspect.architecture import Attention

    block = Attention(kind, (), 3, 1, 8, 4, window)
    pairs = 0
    for query in range(tokens):
        first = 0
        if kind == "sliding":
            first = max(0, query - 4)
        elif kind == "chunked":
            first = query // 5 * 5
        pairs += query - first + 1
    assert block.prefill_flops(tokens) == 2 * 3 * (8 + 4) * pairs


def test_decode_reads_the_experts_that_are_used() -> None:
    arch = get_preset("mixtral-8x7b").architecture
    one = needs(arch, Workload(BF16, context=16, batch=1))["per_token"]["decode"]
    active = sum(arch.active_parameters().values()) - arch.parameters()["embeddings"]
    norms = arch.parameters()["norms"]
    assert one["weight_bytes"] == pytest.approx(2 * (active - norms), rel=1e-9)
    assert one["flops"] == pytest.approx(2 * active, rel=0.01)
    many = needs(arch, Workload(BF16, context=16, batch=512))["per_token"]["decode"]
    whole = sum(arch.parameters().values()) - arch.parameters()["embeddings"]
    assert many["weight_bytes"] * 512 == pytest.approx(2 * (whole - norms), rel=1e-6)
    assert many["flops"] == pytest.approx(one["flops"], rel=1e-9)


def test_prefill_reads_weights_once() -> None:
    arch = get_preset("mixtral-8x7b").architecture
    short, long = (
        needs(arch, Workload(BF16, context=c))["per_token"]["prefill"]["weight_bytes"] for c in (1024, 4096)
    )
    assert short == pytest.approx(4 * long, rel=1e-6)


def test_weights_by_format() -> None:
    sizes = inspect_path("mixtral-8x7b").needs["weights_bytes"]
    assert set(sizes) == set(FORMATS)
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * 46_702_792_704
    assert sizes["int4"] < sizes["mxfp4"] < sizes["float8"] < sizes["int8"] < sizes["bfloat16"]


def test_float32_has_wide_activations_and_a_wide_cache() -> None:
    arch = get_preset("mixtral-8x7b").architecture
    narrow, wide = Workload(BF16), Workload(weight_format("float32"))
    assert (narrow.cache, wide.cache) == ("bfloat16", "float32")
    assert Workload(weight_format("float32"), "bfloat16").cache == "bfloat16"
    for phase in ("decode", "prefill"):
        two, four = (needs(arch, load)["per_token"][phase] for load in (narrow, wide))
        assert four["flops"] == two["flops"]
        for part in ("bytes", "weight_bytes", "cache_bytes", "activation_bytes"):
            assert four[part] == pytest.approx(2 * two[part])


def test_gpus_by_brute_force() -> None:
    arch, load = get_preset("mixtral-8x7b").architecture, Workload(BF16, context=8192, batch=64)
    for gpu in GPUS.values():
        facts = gpus_needed(arch, load, gpu, Assumptions())
        room = 0.9 * gpu.memory
        total = 2 * 46_702_792_704 + 64 * 8192 * 131_072
        assert (facts["split"] - 1) * room < total <= facts["split"] * room
        ranks = facts["expert_parallel_all_to_all"]
        if ranks is None:
            assert rank_bytes(arch, load, 8, 8) > room
            assert "8 ranks" in facts["reason"]
        else:
            assert rank_bytes(arch, load, ranks, -(-64 // ranks)) <= room
            assert ranks == 1 or rank_bytes(arch, load, ranks - 1, -(-64 // (ranks - 1))) > room
    dense = gpus_needed(get_preset("llama-2-70b").architecture, load, GPUS["l4"], Assumptions())
    assert dense["expert_parallel_all_to_all"] is None
    assert "no experts" in dense["reason"]


def test_a_rank_holds_its_share() -> None:
    arch, load = get_preset("olmoe-1b-7b").architecture, Workload(BF16)
    expert = 3 * 2048 * 1024 * 16
    whole = 2 * sum(arch.parameters().values())
    assert rank_bytes(arch, load, 1, 0) == whole
    assert (
        rank_bytes(arch, load, 5, 0) == whole - 2 * (64 - 13) * expert
    )  # 64 experts over 5 ranks: at most 13


def test_context_beyond_the_maximum_is_noted() -> None:
    arch = get_preset("mixtral-8x7b").architecture
    assert context_note(arch, 32768) is None
    assert "maximum of 32768" in (context_note(arch, 32769) or "")
    notes = inspect_path("mixtral-8x7b", context=40000).notes
    assert any("longer than the model's maximum" in note for note in notes)
    assert inspect_path("llama-2-70b").needs["kv_cache"]["context"] == 4096


def test_wrong_workloads() -> None:
    with pytest.raises(UsageError, match="context is 0; expected 1 or more"):
        Workload(BF16, context=0)
    with pytest.raises(UsageError, match="batch is -2"):
        inspect_path("mixtral-8x7b", batch=-2)
    with pytest.raises(UsageError, match="no cache format 'int3'"):
        Workload(BF16, "int3")
    with pytest.raises(UsageError, match="no weight format 'flaot8'; nearest: float8"):
        inspect_path("mixtral-8x7b", weights="flaot8")


def test_popularity_changes_what_is_read() -> None:
    arch = get_preset("mixtral-8x7b").architecture
    step = Step("decode", 4, 16)

    def read(popularity: Popularity | None) -> float:
        return sum(k.work.weights * k.count for k in expert_kernels(arch, step, BF16, popularity))

    assert read(Popularity.zipf(8, 2, 2.0)) < read(None) == read(Popularity.uniform(8, 2))
