"""Llama 4: the router's score scales an expert's input, all experts run on every token, and RoPE is
complex.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters import StackedExperts
from ..library_blocks import LibraryBlock, Routed
from . import modeling_module, replaced, replaced_forwards
from .complex_rope import real_angles, turn_pairs


def _stack(block: Any) -> StackedExperts:
    experts = block.experts  # stored [E, H, 2I] and [E, I, H]
    up, down = (t.detach().transpose(1, 2).contiguous() for t in (experts.gate_up_proj, experts.down_proj))
    return StackedExperts(up, down, None, None)


def _choose(block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor,
                                                       torch.Tensor]:
    """Router logits; the chosen experts' scaled inputs [T·K, H], ids [T·K, 1] and weights (ones)."""
    logits = nn.functional.linear(hidden, block.router.weight)
    top, ids = torch.topk(logits, block.top_k, dim=1)
    scores = torch.sigmoid(top.float()).to(hidden.dtype)
    scaled = (hidden.unsqueeze(1) * scores.unsqueeze(-1)).reshape(-1, hidden.shape[-1])
    return logits, scaled, ids.reshape(-1, 1), torch.ones_like(scores).reshape(-1, 1)


def _forward(block: Any, run: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.reshape(-1, block.hidden_dim)
    logits, scaled, ids, weights = _choose(block, hidden)
    out = run(scaled, ids, weights)
    if block.top_k > 1:
        out = out.reshape(-1, block.top_k, block.hidden_dim).sum(dim=1)
    return block.shared_expert(hidden) + out, logits


def _routed(block: Any, args: tuple[Any, ...], output: Any) -> Routed:
    hidden = args[0].reshape(-1, block.hidden_dim)
    _, scaled, ids, weights = _choose(block, hidden)
    rows = scaled.new_zeros(block.num_experts, *scaled.shape)
    rows[ids[:, 0], torch.arange(len(ids))] = scaled
    own = block.experts(rows.reshape(-1, block.hidden_dim)).reshape(rows.shape)
    return Routed(scaled, ids, weights, own.sum(dim=0))


def _activate(block: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return up * block.experts.act_fn(gate)


def _positions_first(
    query: torch.Tensor, key: torch.Tensor, freqs_cis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = freqs_cis[:, :, None, :, 0], freqs_cis[:, :, None, :, 1]
    return turn_pairs(query, cos, sin), turn_pairs(key, cos, sin)


BLOCKS = {"Llama4TextMoe": LibraryBlock(_stack, _forward, _routed, _activate)}


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """RoPE in real numbers."""
    with (
        replaced(modeling_module(model), apply_rotary_emb=_positions_first),
        replaced_forwards(model, "Llama4TextRotaryEmbedding", real_angles),
    ):
        yield
