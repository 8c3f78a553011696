"""Complex RoPE in real numbers: the rotary module gives cos and sin, stacked on a last axis of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import modeling_module, replaced, replaced_forwards


def turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn neighbours (x0, x1), (x2, x3), ... of the last axis by angles with ``cos`` and ``sin`` [...,
    D/2].
    """
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.reshape(x.shape).type_as(x)


def real_angles(rotary: Any, _name: str) -> Any:
    """Forward of a complex rotary module that gives [B, S, D/2, 2] instead of complex [B, S, D/2]."""

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        freqs = position_ids.unsqueeze(-1).float() * rotary.inv_freq.float()
        return torch.stack([freqs.cos(), freqs.sin()], dim=-1) * rotary.attention_scaling

    return forward


def _heads_first(
    query: torch.Tensor, key: torch.Tensor, freqs_cis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = freqs_cis[:, None, :, :, 0], freqs_cis[:, None, :, :, 1]
    return turn_pairs(query, cos, sin), turn_pairs(key, cos, sin)


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """DeepSeek-V2: heads before positions."""
    with (
        replaced(modeling_module(model), apply_rotary_emb=_heads_first),
        replaced_forwards(model, "DeepseekV2RotaryEmbedding", real_angles),
    ):
        yield
