"""Aria: the shared experts get the block's input as it came; viewing it flat and back confuses the shape
proofs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import replaced_forwards


def _forward_of(block: Any, _name: str) -> Any:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = block.router(flat)
        routed = block.experts(flat, ids, weights).reshape(hidden_states.shape)
        return routed + block.shared_experts(hidden_states)

    return forward


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the MoE layer's forward."""
    with replaced_forwards(model, "AriaTextMoELayer", _forward_of):
        yield
