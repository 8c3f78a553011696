"""Inkling 2: the windows of its dynamic convolution as shifted slices; unfolding compares strides with
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import modeling_module, replaced_forwards


def _forward_of(conv: Any, _name: str) -> Any:
    mask_padding = modeling_module(conv).apply_mask_to_padding_states

    def forward(
        hidden_states: torch.Tensor,
        dynamic_input: torch.Tensor,
        past_key_values: Any = None,
        conv_mask: torch.Tensor | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        dtype, (batch, length,
                width), kernel = hidden_states.dtype, hidden_states.shape, conv.conv_kernel_size
        dynamic = conv.weight_proj(dynamic_input).float().reshape(batch, length, conv.num_heads, 1, kernel)
        weights = conv.static_weight.float().T.reshape(conv.num_heads, -1, kernel) + dynamic
        residual = hidden_states.float()
        context = mask_padding(residual, conv_mask).transpose(1, 2)
        if past_key_values is not None:
            context = past_key_values.update_conv_state(
                context, conv.layer_idx, state_idx=conv.conv_idx, conv_kernel_size=kernel
            )
        context = nn.functional.pad(context, (kernel - 1, 0)).transpose(1, 2)[:, -(length + kernel - 1) :]
        windows = torch.stack([context[:, kernel - 1 - lag :][:, :length] for lag in range(kernel)], dim=-1)
        windows = windows.reshape(batch, length, conv.num_heads, -1, kernel)
        mixed = (windows * weights).sum(-1).reshape(batch, length, width)
        return ((mixed + residual) / math.sqrt(2 * kernel + 1)).to(dtype)

    return forward


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the dynamic convolution's forward."""
    with replaced_forwards(model, "Inkling2DynamicShortConvolution", _forward_of):
        yield
