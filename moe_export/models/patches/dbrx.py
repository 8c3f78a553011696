"""DBRX: expert weights are stored flat, [experts · intermediate, hidden]."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters import StackedExperts
from ..library_blocks import LibraryBlock, Routed


def _stack(experts: Any) -> StackedExperts:
    shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
    w1, v1, w2 = (getattr(experts.mlp, name).detach().view(shape) for name in ("w1", "v1", "w2"))
    return StackedExperts(torch.cat([w1, v1], dim=1), w2.transpose(1, 2).contiguous(), None, None)


def _forward(_experts: Any, run: Any, hidden: torch.Tensor, ids: torch.Tensor,
             weights: torch.Tensor) -> torch.Tensor:
    return run(hidden.reshape(-1, hidden.shape[-1]), ids, weights).reshape(hidden.shape)


def _routed(_experts: Any, args: tuple[Any, ...], output: torch.Tensor) -> Routed:
    hidden, ids, weights = args
    return Routed(hidden.reshape(-1, hidden.shape[-1]), ids, weights, output.reshape(-1, hidden.shape[-1]))


def _activate(experts: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return experts.mlp.activation_fn(gate) * up


BLOCKS = {"DbrxExperts": LibraryBlock(_stack, _forward, _routed, _activate)}
