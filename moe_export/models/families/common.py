"""Configuration values that most tiny models share."""

from __future__ import annotations

from typing import Any

HIDDEN = 32
WINDOW = 8
"""Sliding window of tiny models: shorter than the sequences tests use."""


def base(**overrides: Any) -> dict[str, Any]:
    """A two-layer decoder: hidden 32, four heads on two key-value heads, vocabulary 128."""
    return {"vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | overrides


def mla(**overrides: Any) -> dict[str, Any]:
    """:func:`base` with multi-head latent attention and DeepSeek's names for the experts."""
    return base(num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2,
                n_shared_experts=1, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8,
                v_head_dim=8) | overrides


def indexed(**overrides: Any) -> dict[str, Any]:
    """:func:`mla` with DeepSeek's sparse attention: an indexer keeps fewer keys than tests give."""
    return mla(index_topk=6, index_head_dim=16, index_n_heads=8) | overrides
