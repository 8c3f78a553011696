"""DeepSeek-V2 and Mistral routing (softmax with groups) and families with DeepSeek's sparse attention."""

from __future__ import annotations

from moe_export.models.families.common import WINDOW, indexed, mla
from moe_export.models.families.entry import Family

_GROUPED = "sigmoid, selection bias, 1 of 2 groups, top-2 of 8, renormalised, times 2.5"
_SHARED = "; shared expert"

LATENT: tuple[Family, ...] = (
    Family("deepseek_v2", "works", "softmax, 1 of 2 groups (by maximum), top-2 of 8, times 1.5" + _SHARED,
           "DeepseekV2ForCausalLM",
           mla(n_group=2, topk_group=1, topk_method="group_limited_greedy", routed_scaling_factor=1.5,
               first_k_dense_replace=1)),
    Family("mistral4", "works", "softmax, 1 of 2 groups, top-2 of 8, renormalised" + _SHARED,
           "Mistral4ForCausalLM", mla(n_group=2, topk_group=1, first_k_dense_replace=1)),
    Family("deepseek_v32", "works", _GROUPED + _SHARED, "DeepseekV32ForCausalLM",
           indexed(n_group=2, topk_group=1, mlp_layer_types=["dense", "sparse"])),
    Family("glm_moe_dsa", "works", _GROUPED + _SHARED, "GlmMoeDsaForCausalLM",
           indexed(n_group=2, topk_group=1, mlp_layer_types=["dense", "sparse"],
                   indexer_types=["full", "shared"])),
    Family("axk2", "works", _GROUPED + _SHARED, "AXK2ForCausalLM",
           indexed(n_group=2, topk_group=1, mlp_layer_types=["dense", "sparse"], gated_norm_rank=4)),
    Family("hy_v4", "works", _GROUPED + _SHARED, "HYV4ForCausalLM",
           indexed(n_group=2, topk_group=1, routed_scaling_factor=2.5, mlp_layer_types=["dense", "sparse"],
                   indexer_types=["full", "shared"], hc_mult=2)),
    Family("dots3_note", "works", _GROUPED + _SHARED, "Dots3NoteForCausalLM",
           indexed(n_group=2, topk_group=1, routed_scaling_factor=2.5,
                   mlp_layer_types=["dense", "sparse", "sparse"],
                   num_hidden_layers=3,
                   layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
                   sliding_window=WINDOW, shared_experts_intermediate_size=24, swa_num_attention_heads=4,
                   swa_num_key_value_heads=4, swa_q_lora_rank=24, swa_kv_lora_rank=16, swa_head_dim=16,
                   swa_qk_nope_head_dim=8, swa_v_head_dim=8, head_dim=16), scope="text decoder"),
    Family("deepseek_v4", "works",
           "sqrt of softplus, selection bias, top-2 of 8, renormalised, times 1.5; first layer "
           "by a table from token id to experts", "DeepseekV4ForCausalLM",
           indexed(num_hidden_layers=3, scoring_func="sqrtsoftplus", hc_mult=2, head_dim=16,
                   sliding_window=WINDOW,
                   num_key_value_heads=1, qk_rope_head_dim=8, o_groups=2, o_lora_rank=8,
                   layer_types=["heavily_compressed_attention", "compressed_sparse_attention",
                                "sliding_attention"],
                   mlp_layer_types=["hash_moe", "moe", "moe"],
                   compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4})),
)
