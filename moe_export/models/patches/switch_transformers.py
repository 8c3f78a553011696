"""Switch Transformers: one module per expert; a one-hot choice that is all zero where a token is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters import StackedExperts
from ..library_blocks import LibraryBlock, Routed
from . import replaced_forwards


def _stack(experts: Any) -> StackedExperts:
    up = torch.stack([e.wi.weight.detach() for e in experts.values()])
    down = torch.stack([e.wo.weight.detach() for e in experts.values()])
    return StackedExperts(up, down, None, None)


def _ids(chosen: torch.Tensor) -> torch.Tensor:
    """One-hot [T, 1, E] → ids [T, 1], -1 where nothing is chosen."""
    chosen = chosen.squeeze(1)
    ids = torch.argmax(chosen, dim=-1, keepdim=True)
    return torch.where(chosen.sum(dim=-1, keepdim=True) > 0, ids, -1)


def _forward(_experts: Any, run: Any, hidden: torch.Tensor, chosen: torch.Tensor,
             weights: torch.Tensor) -> torch.Tensor:
    return run(hidden, _ids(chosen), weights)


def _routed(_experts: Any, args: tuple[Any, ...], output: torch.Tensor) -> Routed:
    return Routed(args[0], _ids(args[1]), args[2], output)


def _activate(experts: Any, rows: torch.Tensor) -> torch.Tensor:
    return next(iter(experts.values())).act(rows)


BLOCKS = {"SwitchTransformersExperts": LibraryBlock(_stack, _forward, _routed, _activate, drops=True)}


def _router_forward(router: Any, _name: str) -> Any:
    """The router's forward without moving its classifier to another dtype, which replaces parameters."""

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        linear = router.classifier
        bias = None if linear.bias is None else linear.bias.to(router.dtype)
        logits = nn.functional.linear(hidden_states.to(router.dtype), linear.weight.to(router.dtype), bias)
        probabilities = torch.softmax(logits, dim=-1).to(hidden_states.dtype)
        chosen = nn.functional.one_hot(torch.argmax(probabilities, dim=-1), num_classes=router.num_experts)
        within = torch.cumsum(chosen, dim=-2) <= router.expert_capacity
        return chosen * within, probabilities.max(dim=-1).values.unsqueeze(-1), logits

    return forward


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the router's forward."""
    with replaced_forwards(model, "SwitchTransformersTop1Router", _router_forward):
        yield
