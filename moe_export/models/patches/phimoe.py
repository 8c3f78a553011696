"""PhiMoE: the scale of its long RoPE chosen by a tensor operation, not a branch on the largest position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import replaced_forwards


def _forward_of(rotary: Any, _name: str) -> Any:
    inv_freq, own_scale = rotary.rope_init_fn(rotary.config)
    settings = rotary.config.rope_parameters

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale: Any = own_scale
        if settings["rope_type"] != "default":
            beyond = position_ids.max() + 1 > settings["original_max_position_embeddings"]
            scale = torch.where(beyond, float(settings["long_mscale"]), float(settings["short_mscale"]))
        freqs = position_ids.unsqueeze(-1).float() * inv_freq.float()
        angles = torch.cat((freqs, freqs), dim=-1)
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)

    return forward


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the rotary module's forward."""
    with replaced_forwards(model, "PhimoeRotaryEmbedding", _forward_of):
        yield
