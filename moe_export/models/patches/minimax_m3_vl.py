"""MiniMax M3: key blocks padded by a fixed amount and cut, so that no length is taken to fill its last
block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import modeling_module, replaced_forwards


def _forward_of(indexer: Any, _name: str) -> Any:
    rotate = modeling_module(indexer).apply_rotary_pos_emb

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Any,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        size, block = indexer.head_dim, indexer.block_size
        query = indexer.q_norm(indexer.q_proj(hidden_states).reshape(batch, length, -1, size)).transpose(1, 2)
        key = indexer.k_norm(indexer.k_proj(hidden_states).reshape(batch, length, 1, size)).transpose(1, 2)
        cos, sin = position_embeddings
        query, key = rotate(query, key, cos[..., :size], sin[..., :size])
        if past_key_values is not None:
            key = past_key_values.layers[indexer.layer_idx].update_index(key)
        total = key.shape[2]
        blocks = (total + block - 1) // block
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2))
        future = torch.arange(total) > position_ids[:, None, :, None]
        scores = scores.masked_fill(future, float("-inf"))
        scores = nn.functional.pad(scores, (0, block - 1), value=float("-inf"))[..., : blocks * block]
        best = scores.reshape(batch, indexer.num_heads, length, blocks, block).amax(dim=-1)
        if indexer.local_blocks > 0:
            local = (position_ids // block)[..., None] - torch.arange(indexer.local_blocks)
            local = local.clamp(min=0).unsqueeze(1).expand(-1, indexer.num_heads, -1, -1)
            best = best.scatter(-1, local, float("inf"))
        top, ids = best.topk(torch.sym_min(indexer.topk_blocks, blocks), dim=-1)
        return ids.masked_fill(top == float("-inf"), -1)

    return forward


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the indexer's forward."""
    with replaced_forwards(model, "MiniMaxM3VLIndexer", _forward_of):
        yield
