"""A small model of one's own, with an MoE block that is not from transformers.

An encoder of sensor frames: attention, then experts, twice. The router compares each token with one learned
direction per expert (cosine, with a learned sharpness). The experts are an ``nn.ModuleList``.

    moe-export build examples/own_module/model.py:build --task module -o out/own-module
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_export import MoEBlockSpec, moe_block


class Expert(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


# The decorator is the whole adapter: what moe-export needs to know about the block.
@moe_block(
    MoEBlockSpec(
        experts="experts",
        gate_proj="w1",
        up_proj="w3",
        down_proj="w2",
        activation="silu",
        route=lambda block, hidden: block.route(hidden),
        top_k="top_k",
    )
)
class CosineMoE(nn.Module):
    """Each token goes to the ``top_k`` experts with the nearest directions, weighted by softmax."""

    def __init__(self, hidden: int, inner: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.directions = nn.Parameter(torch.randn(num_experts, hidden))
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(num_experts))

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, H] → weights [T, K], expert ids [T, K]."""
        cosine = functional.normalize(hidden, dim=-1) @ functional.normalize(self.directions, dim=-1).T
        scores, ids = (cosine * self.sharpness).topk(self.top_k, dim=-1)
        return scores.softmax(-1), ids

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == index)
            out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return out.reshape(x.shape)


class Layer(nn.Module):
    """Attention and experts, each after a norm and with a residual."""

    def __init__(self, hidden: int, heads: int, inner: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm_2 = nn.LayerNorm(hidden)
        self.moe = CosineMoE(hidden, inner, num_experts, top_k)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x [batch, sequence, hidden]; valid [batch, 1, 1, sequence], false where a frame is padding."""
        batch, sequence, hidden = x.shape
        split = self.qkv(self.norm_1(x)).view(batch, sequence, 3, self.heads, hidden // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=valid)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, hidden))
        out: Tensor = x + self.moe(self.norm_2(x))
        return out


class SensorEncoder(nn.Module):
    """frames [batch, sequence, channels] → features [batch, sequence, hidden].

    mask [batch, sequence]: 1 = a frame, 0 = padding; each row needs at least one 1.
    """

    def __init__(
        self,
        channels: int = 12,
        hidden: int = 64,
        layers: int = 2,
        heads: int = 4,
        inner: int = 96,
        num_experts: int = 6,
        top_k: int = 2,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, inner, num_experts, top_k) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, frames: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(frames)
        valid = mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, valid)
        return {"features": self.norm(x)}


def build() -> tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, str]]]:
    """The model (seeded random weights, float32), inputs to trace it with, and their free axes by name."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SensorEncoder().eval()
    inputs = {
        "frames": torch.randn(2, 10, 12, generator=generator),
        "mask": torch.ones(2, 10, dtype=torch.int64),
    }
    inputs["mask"][1, 7:] = 0
    axes = {0: "batch", 1: "sequence"}
    return model, inputs, {"frames": axes, "mask": dict(axes)}
