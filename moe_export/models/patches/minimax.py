"""MiniMax: lightning attention token by token, its state in the ordinary cache of linear attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import modeling_module, replaced, replaced_forwards
from .recurrences import decayed_linear_attention


def _forward_of(attention: Any, _name: str) -> Any:
    mask = modeling_module(attention).apply_mask_to_padding_states

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **_unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, _ = hidden_states.shape
        heads, size = attention.num_attention_heads, attention.head_dim
        qkv = mask(attention.act_fn(attention.qkv_proj(hidden_states)), attention_mask)
        query, key, value = qkv.reshape(batch, length, heads, 3 * size).split(size, dim=3)
        state = None
        if past_key_values is not None:
            state = past_key_values.get_recurrent_state(attention.layer_idx, state_idx=0)
        if state is None:
            state = query.new_zeros(batch, heads, size, size)
        out, state = decayed_linear_attention(query, key, value, attention.slope_rate, state)
        out = attention.norm(out.reshape(batch, length, heads * size).to(hidden_states.dtype))
        out = attention.out_proj(torch.sigmoid(attention.output_gate(hidden_states)) * out)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, attention.layer_idx)
        return out, state

    return forward


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace lightning attention, and let the model take the ordinary cache."""
    from transformers.cache_utils import DynamicCache

    with (
        replaced(modeling_module(model), MiniMaxCache=DynamicCache),
        replaced_forwards(model, "MiniMaxLightningAttention", _forward_of),
    ):
        yield
