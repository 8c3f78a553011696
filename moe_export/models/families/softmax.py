"""Families whose router is a softmax over experts (or over the chosen ones)."""

from __future__ import annotations

# fmt: off (tables: values of one kind stand on one line)
from moe_export.models.families.common import WINDOW, base
from moe_export.models.families.entry import Family

_RENORMALISED = "softmax, top-2 of 4, renormalised"
_PLAIN = "softmax, top-2 of 4"
_CHOSEN = "top-2 of 4, softmax over the chosen"

SOFTMAX: tuple[Family, ...] = (
    Family("mixtral", "works", _RENORMALISED, "MixtralForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW)),
    Family("qwen2_moe", "works", _PLAIN + "; shared expert with a sigmoid gate", "Qwen2MoeForCausalLM",
           base(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                shared_expert_intermediate_size=24,
                use_sliding_window=True, sliding_window=WINDOW, decoder_sparse_step=1)),
    Family("qwen3_moe", "works", _RENORMALISED, "Qwen3MoeForCausalLM",
           base(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8,
                norm_topk_prob=True,
                mlp_only_layers=[1], num_hidden_layers=3)),
    Family("olmoe", "works", _PLAIN, "OlmoeForCausalLM",
           base(num_experts=4, num_experts_per_tok=2, clip_qkv=2.0)),
    Family("flex_olmo", "works", _PLAIN, "FlexOlmoForCausalLM", base(num_experts=4, num_experts_per_tok=2)),
    Family("mellum", "works", _RENORMALISED, "MellumForCausalLM",
           base(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention"])),
    Family("hunyuan_v1_moe", "works", _RENORMALISED + "; shared expert", "HunYuanMoEV1ForCausalLM",
           base(num_experts=4, moe_topk=2, head_dim=8)),
    Family("ernie4_5_moe", "works",
           "softmax, bias in the choice only, top-2 of 4, renormalised; shared experts",
           "Ernie4_5_MoeForCausalLM",
           base(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_intermediate_size=24,
                num_hidden_layers=3)),
    Family("gpt_oss", "works", _CHOSEN + "; bias in router and experts", "GptOssForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=WINDOW)),
    Family("openai_privacy_filter", "works", _CHOSEN + ", weights / K; bias in router and experts",
           "OpenAIPrivacyFilterForTokenClassification",
           base(num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=WINDOW, num_labels=5),
           tasks=("feature-extraction",), scope="token classifier (bidirectional attention, no cache)"),
    Family("granitemoe", "works", _CHOSEN, "GraniteMoeForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=2.0, logits_scaling=1.5,
                residual_multiplier=0.8, attention_multiplier=0.3)),
    Family("granitemoeshared", "works", _CHOSEN + "; shared expert", "GraniteMoeSharedForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24,
                attention_multiplier=0.3)),
    Family("granitemoe_swa", "works", _CHOSEN + "; shared expert", "GraniteMoeSWAForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24,
                sliding_window=WINDOW,
                attention_multiplier=0.3, layer_types=["full_attention", "sliding_attention"])),
    Family("aria", "works", _CHOSEN + "; shared experts", "AriaTextForCausalLM",
           base(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1), scope="text decoder"),
    Family("cohere2_moe", "works", _CHOSEN + "; averaged with a shared expert", "Cohere2MoeForCausalLM",
           base(num_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=WINDOW, num_shared_experts=1,
                layer_types=["sliding_attention", "full_attention"], logit_scale=0.25)),
    Family("dbrx", "works", "softmax, top-2 of 4, divided by their sum", "DbrxForCausalLM",
           {"vocab_size": 128, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
            "pad_token_id": 0,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}}),
    Family("jetmoe", "works", _CHOSEN + "; attention heads are experts too", "JetMoeForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, kv_channels=8)),
    Family("phimoe", "works", "sparsemixer: two masked softmaxes, one per choice", "PhimoeForCausalLM",
           base(num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
                sliding_window=WINDOW)),
    Family("doge", "limited",
           "product keys: top-2 of the sums of two top-4 lists, softmax over the chosen; a dense MLP beside",
           "DogeForCausalLM", base(is_moe=True, num_experts=16, num_experts_per_tok=2, keep_window_size=12),
           reason="equal to transformers for the same unpadded batch only: its router reads [B, S, 2 keys] "
           "as [2, B S, keys], so that a token is routed by the logits of other tokens; its experts are "
           "rows of a table, and no MoE layer is seen in the graph; beyond its window equal tokens tie",
           left_padding=False, cached_reference=True),
)
