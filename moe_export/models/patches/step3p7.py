"""Step 3.7: plain stacked experts outside the experts interface, with a clamp in their gate."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters import StackedExperts
from ..library_blocks import LibraryBlock, Routed


def _stack(experts: Any) -> StackedExperts:
    return StackedExperts(experts.gate_up_proj.detach(), experts.down_proj.detach(), None, None)


def _forward(_experts: Any, run: Any, hidden: torch.Tensor, ids: torch.Tensor,
             weights: torch.Tensor) -> torch.Tensor:
    return run(hidden, ids, weights)


def _routed(_experts: Any, args: tuple[Any, ...], output: torch.Tensor) -> Routed:
    return Routed(args[0], args[1], args[2], output)


def _activate(experts: Any, rows: torch.Tensor) -> torch.Tensor:
    return experts._apply_gate(rows)


BLOCKS = {"Step3p7Experts": LibraryBlock(_stack, _forward, _routed, _activate)}
