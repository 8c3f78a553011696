"""LongCat-Flash: experts behind the routed ones are identities; the ops see them as dropped."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters import StackedExperts
from ..library_blocks import LibraryBlock, Routed


def _stack(experts: Any) -> StackedExperts:
    count = experts.num_routed_experts  # the parameter has rows for the identity experts too
    return StackedExperts(experts.gate_up_proj.detach()[:count].contiguous(), experts.down_proj.detach(),
                          None, None)


def _split(
    experts: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routed ids (-1 for an identity expert) and what the identity experts add."""
    identity = ids >= experts.num_routed_experts
    share = (weights * identity.to(weights.dtype)).sum(dim=-1, keepdim=True)
    return torch.where(identity, -1, ids), hidden * share.to(hidden.dtype)


def _forward(experts: Any, run: Any, hidden: torch.Tensor, ids: torch.Tensor,
             weights: torch.Tensor) -> torch.Tensor:
    routed, identity = _split(experts, hidden, ids, weights)
    return run(hidden, routed, weights) + identity


def _routed(experts: Any, args: tuple[Any, ...], output: torch.Tensor) -> Routed:
    hidden, ids, weights = args
    routed, identity = _split(experts, hidden, ids, weights)
    return Routed(hidden, routed, weights, output - identity)


def _activate(experts: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


BLOCKS = {"LongcatFlashExperts": LibraryBlock(_stack, _forward, _routed, _activate, drops=True)}
