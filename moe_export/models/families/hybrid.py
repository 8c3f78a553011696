"""Hybrids: layers with a recurrent state beside attention layers."""

from __future__ import annotations

# fmt: off (tables: values of one kind stand on one line)
from moe_export.models.families.common import WINDOW, base, mla
from moe_export.models.families.entry import Family

_GROUPED = "sigmoid, selection bias, 1 of 2 groups, top-2 of 8, renormalised, times 2.5; shared expert"
_QWEN = "softmax, top-2 of 4, renormalised; shared expert with a sigmoid gate"


def _delta(**overrides: object) -> dict[str, object]:
    return base(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                shared_expert_intermediate_size=24,
                head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
                linear_num_value_heads=4, num_hidden_layers=3,
                layer_types=["linear_attention", "full_attention", "linear_attention"]) | overrides


_ACCUMULATES = (
    "float32 rounding of the recurrent state accumulates over the sequence, in transformers and in the engine"
)

HYBRID: tuple[Family, ...] = (
    Family("jamba", "works", "softmax, top-2 of 4", "JambaForCausalLM",
           base(num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
                attn_layer_period=3, attn_layer_offset=1, num_hidden_layers=4, mamba_d_state=4,
                mamba_d_conv=3,
                mamba_dt_rank=4, use_mamba_kernels=False),
           tolerance=1e-4, tolerance_reason=_ACCUMULATES),
    Family("granitemoehybrid", "works", "top-2 of 4, softmax over the chosen; shared expert",
           "GraniteMoeHybridForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24, num_hidden_layers=3,
                layer_types=["linear_attention", "full_attention", "linear_attention"], mamba_n_heads=4,
                mamba_d_state=8, mamba_d_head=16, mamba_n_groups=2, mamba_chunk_size=4,
                position_embedding_type="rope",
                attention_multiplier=0.3)),
    Family("nemotron_h", "works",
           "sigmoid, selection bias, 1 of 2 groups, top-2 of 8, renormalised, times 2.5; shared "
           "expert", "NemotronHForCausalLM",
           {k: v for k, v in base(layer_types=["linear_attention", "moe", "full_attention", "mlp", "moe"],
                                  head_dim=8, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16,
                                  n_groups=2,
                                  chunk_size=4, n_routed_experts=8, moe_intermediate_size=24,
                                  moe_shared_expert_intermediate_size=24, num_experts_per_tok=2, n_group=2,
                                  topk_group=1, routed_scaling_factor=2.5, use_mamba_kernels=False,
                                  moe_latent_size=16).items()
            if k != "num_hidden_layers"}),
    Family("qwen3_next", "works", _QWEN, "Qwen3NextForCausalLM", _delta(),
           tolerance=1e-4, tolerance_reason=_ACCUMULATES),
    Family("qwen3_5_moe", "works", _QWEN, "Qwen3_5MoeForCausalLM", _delta(head_dim=16), scope="text decoder",
           tolerance=1e-4, tolerance_reason=_ACCUMULATES),
    Family("kimi_linear", "works", _GROUPED, "KimiLinearForCausalLM",
           mla(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
               num_local_experts=8, n_group=2, topk_group=1, routed_scaling_factor=2.5, linear_head_dim=8,
               linear_num_heads=4, q_lora_rank=None, mlp_layer_types=["dense", "sparse", "sparse"])),
    Family("bailing_hybrid", "works", _GROUPED, "BailingHybridForCausalLM",
           mla(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
               num_local_experts=8, n_group=2, topk_group=1, head_dim=8,
               mlp_layer_types=["dense", "sparse", "sparse"])),
    Family("minimax", "works", "softmax, top-2 of 4, renormalised", "MiniMaxForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, head_dim=8, block_size=4,
                layer_types=["linear_attention", "full_attention"], linear_attn_alpha_factor=1.2)),
    Family("lfm2_moe", "works", "sigmoid, selection bias, top-2 of 4, renormalised, times 1.5",
           "Lfm2MoeForCausalLM",
           base(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, num_dense_layers=1,
                num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"],
                routed_scaling_factor=1.5)),
    Family("zaya", "works", "one MLP router fed by the layer before, selection bias, top-1 of 4 and one skip",
           "ZayaForCausalLM",
           base(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=24, head_dim=8,
                router_hidden_size=16,
                num_hidden_layers=3, layer_types=["hybrid", "hybrid_sliding", "hybrid"],
                sliding_window=WINDOW)),
    Family("inkling", "works",
           "sigmoid, selection bias, top-2 of 8, normalised jointly with the shared experts",
           "InklingForCausalLM",
           base(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8,
                swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
                sliding_window_size=WINDOW,
                d_rel=4, rel_extent=8, layer_types=["hybrid_sliding", "hybrid"],
                logits_mup_width_multiplier=2.0,
                num_hidden_layers=2, log_scaling_n_floor=4), scope="text decoder"),
    Family("inkling2", "works", "sigmoid, selection bias, top-2 of 8, renormalised, times 8",
           "Inkling2ForCausalLM",
           {k: v for k,
            v in base(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8,
                                  swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
                                  sliding_window_size=WINDOW, d_rel=4, rel_extent=8, unpadded_vocab_size=120,
                                  layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
                                  num_hidden_layers=3,
                                  n_layers_per_attn_res_block=2, log_scaling_n_floor=4).items()
            if k != "intermediate_size"}, scope="text decoder"),
    Family("qwen4_exp", "refused",
           "softmax, top-k, renormalised; shared expert with a sigmoid gate",
           reason="its attention picks keys in Python loops over every query, and its n-gram context starts "
           "from end-of-text tokens, which an empty past of zeros cannot hold"),
)
