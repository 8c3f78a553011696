"""MoE blocks written by hand in different ways, and adapters for them. Each test registers what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_export import MoEBlockSpec
from moe_export.models.adapters import ADAPTERS

HIDDEN, INNER, EXPERTS, TOP_K = 6, 5, 4, 2


@contextmanager
def registered(*pairs: tuple[type, MoEBlockSpec]) -> Iterator[None]:
    """Adapters that hold inside only."""
    before = dict(ADAPTERS)
    ADAPTERS.update(pairs)
    try:
        yield
    finally:
        ADAPTERS.clear()
        ADAPTERS.update(before)


class Gated(nn.Module):
    """``down(silu(gate x) * up x)``; ``bias`` on all three."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, INNER, bias=bias)
        self.up = nn.Linear(HIDDEN, INNER, bias=bias)
        self.down = nn.Linear(INNER, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """``second(relu(first x))`` with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, INNER)
        self.second = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def route(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = block.router(hidden).softmax(-1).topk(block.top_k, dim=-1)
    return weights, ids


class GatedMoE(nn.Module):
    """The usual block: [..., H] → [..., H]."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Gated(bias) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        return run_experts(self, tokens, *route(self, tokens)).reshape(x.shape)


def run_experts(block: Any, tokens: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    members = list(block.experts.values() if isinstance(block.experts, nn.ModuleDict) else block.experts)
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(members):
        rows, slots = torch.where(ids == number)
        out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
    return out


GATED = MoEBlockSpec(
    experts="experts", gate_proj="gate", up_proj="up", down_proj="down", top_k="top_k", route=route
)


class PlainMoE(nn.Module):
    """Experts with biases in a ModuleDict; a token drops an expert whose weight is below a quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleDict({f"expert_{i}": Plain() for i in range(EXPERTS)})

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        return run_experts(self, tokens, *dropping_route(self, tokens)).reshape(x.shape)


def dropping_route(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = block.router(hidden).softmax(-1).topk(TOP_K, dim=-1)
    return weights, torch.where(weights < 0.25, -1, ids)


PLAIN = MoEBlockSpec(
    experts="experts",
    up_proj="first",
    down_proj="second",
    activation="relu",
    top_k=TOP_K,
    route=dropping_route,
)


class SharedMoE(GatedMoE):
    """With a shared expert, a residual, and the mean hidden state of each sequence in its routing.

    Returns the result and the number of tokens.
    """

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.shared = Plain()

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = sequence_route(self, x)
        out = shared_after(self, tokens, run_experts(self, tokens, weights, ids))
        return counted(self, out.reshape(x.shape))


def sequence_route(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [B, S, H] as the block got it."""
    logits = block.router(hidden + hidden.mean(dim=1, keepdim=True))
    weights, ids = logits.reshape(-1, EXPERTS).softmax(-1).topk(block.top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


def shared_after(block: Any, hidden: Tensor, combined: Tensor) -> Tensor:
    return hidden + 0.5 * combined + block.shared(hidden)


def counted(_block: Any, result: Tensor) -> tuple[Tensor, Tensor]:
    return result, result.new_ones(result.shape[:2]).sum(dim=1)


SHARED = MoEBlockSpec(
    experts="experts",
    gate_proj="gate",
    up_proj="up",
    down_proj="down",
    top_k="top_k",
    route=sequence_route,
    flatten=False,
    after=shared_after,
    output=counted,
)


class Stack(nn.Module):
    """Three kinds of blocks, one of them run twice: frames [batch, sequence, H] → features and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = GatedMoE()
        self.plain = PlainMoE()
        self.shared = SharedMoE()

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        x = frames + self.gated(frames)
        x = x + self.plain(x)
        x, count = self.shared(x=x)
        return {"features": x + self.gated(torch.tanh(x)), "count": count}


def seeded(cls: type[nn.Module], *arguments: Any) -> Any:
    """A module with its own random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(*arguments).eval()


def frames(batch: int = 3, sequence: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, sequence, HIDDEN, generator=torch.Generator().manual_seed(seed))
