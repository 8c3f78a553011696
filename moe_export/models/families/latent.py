"""DeepSeek-V2 and Mistral routing (softmax with groups) and families with DeepSeek's sparse attention."""

from __future__ import annotations

# fmt: off (tables: values of one kind stand on one line)
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
    Family("deepseek_v4", "refused",
           "sqrt of softplus, selection bias, top-k, renormalised; first layers by a table from token id "
           "to experts",
           reason="its cache keeps compressed windows and the tokens of an unfinished window, whose sizes "
           "follow no fixed rule per token; without the cache its code fixes the number of windows while "
           "it is traced"),
)
