"""ZAYA: the delayed half of the values as one slice; transformers cuts it twice, to a length of S - 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModelError
from . import modeling_module, replaced_forwards


def _forward_of(cca: Any, _name: str) -> Any:
    repeat = modeling_module(cca).repeat_kv
    if cca.v_proj_delayed.bias is not None:
        raise UnsupportedModelError(
            "zaya with attention_bias: its first token sees a bias as its past value, which an empty past of "
            "zeros cannot hold"
        )

    def forward(
        hidden_states: torch.Tensor, past_key_values: Any, conv_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if conv_mask is not None:
            hidden_states = hidden_states * conv_mask[:, :, None].to(hidden_states.dtype)
        shape, size, kernel = hidden_states.shape[:-1], cca.head_dim, cca.conv_kernel_size
        queries, keys = cca.q_proj(hidden_states), cca.k_proj(hidden_states)
        grouped = repeat(keys.reshape(*shape, -1, size).transpose(1, 2), cca.num_key_value_groups)
        query_rest = (queries.reshape(*shape, -1, size) + grouped.transpose(1, 2)) * 0.5
        key_rest = query_rest.reshape(*shape, -1, cca.num_key_value_groups, size).mean(dim=-2)

        both = torch.cat([queries, keys], dim=-1).transpose(1, 2)
        conv_state = value_state = None
        if past_key_values is not None:
            conv_state = past_key_values.get_conv_state(cca.layer_idx, state_idx=0)
            value_state = past_key_values.get_recurrent_state(cca.layer_idx, state_idx=0)
        before = nn.functional.pad(both,
                                   (kernel, 0)) if conv_state is None else torch.cat([conv_state, both], -1)
        delayed = cca.v_proj_delayed(hidden_states)
        if value_state is None:
            value_state = torch.zeros_like(delayed[:, 0])
        shifted = torch.cat([value_state.unsqueeze(1), delayed], dim=1)
        if past_key_values is not None:
            past_key_values.update_conv_state(before[..., -kernel:], cca.layer_idx)
            past_key_values.update_recurrent_state(delayed[:, -1, :], cca.layer_idx)

        mixed = cca.conv_qk_grouped(cca.conv_qk_depthwise(before)).transpose(1, 2)
        split = queries.shape[-1]
        query = mixed[..., :split].reshape(*shape, -1, size) + query_rest
        key = mixed[..., split:].reshape(*shape, -1, size) + key_rest
        value = torch.cat([cca.v_proj_current(hidden_states), shifted[:, :-1]], dim=-1)
        return query, key, value.reshape(*shape, -1, size)

    return forward


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the projection's forward."""
    with replaced_forwards(model, "ZayaCCAProjection", _forward_of):
        yield
