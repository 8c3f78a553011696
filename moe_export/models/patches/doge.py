"""Doge: the router's view and the dynamic mask written so that no size is fixed.

The router's output [B, S, 2·keys] is read as [2, B·S, keys] in memory order, as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import replaced_forwards


def _moe_forward(block: Any, _name: str) -> Any:
    def forward(hidden_states: torch.Tensor, **_unused: Any) -> tuple[torch.Tensor, torch.Tensor]:
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, shape[-1])
        memory = block.router_gate(flat).reshape(-1)
        logits = memory.reshape(2, -1, block.router_gate.out_features // 2)
        (scores_x, scores_y), (ids_x, ids_y) = logits.topk(block.num_keys, dim=-1)
        sums = (scores_x.unsqueeze(-1) + scores_y.unsqueeze(-2)).flatten(-2)
        pairs = (ids_x.unsqueeze(-1) * block.num_keys + ids_y.unsqueeze(-2)).flatten(-2)
        scores, positions = sums.topk(block.top_k, dim=-1)
        ids = pairs.gather(-1, positions)
        weights = torch.softmax(scores, dim=-1)
        if block.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        inner = torch.matmul(block.down_embed(ids), flat.unsqueeze(-1)).squeeze(-1)
        inner = block.act_fn(inner) * weights
        routed = torch.matmul(inner.unsqueeze(1), block.up_embed(ids)).reshape(shape)
        dense = block.down_proj(block.act_fn(block.gate_proj(hidden_states)) * block.up_proj(hidden_states))
        return dense + routed, logits

    return forward


@contextmanager
def _any_length_mask(model: nn.Module) -> Iterator[None]:
    changed = [m for m in model.modules() if type(m).__name__ == "DogeAttention"]

    def prepare(
        hidden_states: torch.Tensor,
        dt_states: torch.Tensor,
        keep_window_size: int = 2048,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        lowest = torch.finfo(hidden_states.dtype).min
        mask = dt_states[:, :, None, :].expand(-1, -1, hidden_states.shape[1], -1)
        if attention_mask is not None:
            hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
            mask = mask.masked_fill(hidden[:, :, :, : mask.shape[-1]], lowest)
        kept = torch.topk(mask, torch.sym_min(keep_window_size, mask.shape[-1]), dim=-1).indices
        active = torch.zeros_like(mask).scatter(-1, kept, 1.0)
        return mask.masked_fill(active == 0.0, lowest)

    try:
        for module in changed:
            module.prepare_dynamic_mask = prepare
        yield
    finally:
        for module in changed:
            del module.prepare_dynamic_mask


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the MoE block's forward and the dynamic mask."""
    with replaced_forwards(model, "DogeCDMoE", _moe_forward), _any_length_mask(model):
        yield
