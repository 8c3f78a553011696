"""Noisy top-k gating, written from the paper: Shazeer et al., "Outrageously Large Neural Networks: The
Sparsely-Gated Mixture-of-Experts Layer", 2017, https://arxiv.org/abs/1701.06538, equations 1 and 3 to 5.

    y       = sum_i G(x)_i E_i(x)                                               (1)
    G(x)    = Softmax(KeepTopK(H(x), k))                                        (3)
    H(x)_i  = (x . W_g)_i + StandardNormal() * Softplus((x . W_noise)_i)        (4)
    KeepTopK(v, k)_i = v_i where v_i is among the k largest of v, else -inf     (5)

The noise balances the experts while training; an engine is made from the model in eval mode, where
H(x) = x . W_g. The balancing losses of section 4 belong to training only and are left out.

    moe-export build examples/noisy_top_k/model.py:build --task module -o out/noisy-top-k
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_export import MoEBlockSpec, register_moe_block


class Expert(nn.Module):
    """One hidden ReLU layer, as in the paper's experiments."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Linear(hidden, inner)
        self.second = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(functional.relu(self.first(x)))
        return out


class NoisyTopKMoE(nn.Module):
    """The sparsely gated layer: x [..., H] → y [..., H]."""

    def __init__(self, hidden: int, inner: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.w_gate = nn.Parameter(torch.empty(hidden, num_experts))
        self.w_noise = nn.Parameter(torch.empty(hidden, num_experts))
        # The paper starts from zeros, where noise alone decides; this model stays untrained.
        nn.init.normal_(self.w_gate, std=hidden**-0.5)
        nn.init.normal_(self.w_noise, std=hidden**-0.5)
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(num_experts))

    def gate_logits(self, x: Tensor) -> Tensor:
        """H(x), equation 4: [T, H] → [T, E]."""
        clean = x @ self.w_gate
        if not self.training:
            return clean
        return clean + torch.randn_like(clean) * functional.softplus(x @ self.w_noise)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nonzero entries of G(x) and where they are: weights [T, K], expert ids [T, K].

        KeepTopK's output is minus infinity elsewhere, so its softmax is the softmax over the k kept values.
        """
        kept, ids = self.gate_logits(x).topk(self.top_k, dim=-1)
        return kept.softmax(-1), ids

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(tokens)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == index)
            y.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return y.reshape(x.shape)


# The whole adapter: what moe-export needs to know about the layer.
register_moe_block(
    NoisyTopKMoE,
    MoEBlockSpec(
        experts="experts",
        gate_proj=None,
        up_proj="first",
        down_proj="second",
        activation="relu",
        route=NoisyTopKMoE.route,
        top_k="top_k",
    ),
)


class FrameTagger(nn.Module):
    """The layer between two others: frames [batch, time, channels] → scores [batch, time, tags]."""

    def __init__(
        self,
        channels: int = 16,
        hidden: int = 48,
        inner: int = 64,
        num_experts: int = 8,
        top_k: int = 4,
        tags: int = 5,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, hidden)
        self.moe = NoisyTopKMoE(hidden, inner, num_experts, top_k)
        self.head = nn.Linear(hidden, tags)

    def forward(self, frames: Tensor) -> Tensor:
        x = torch.tanh(self.embed(frames))
        scores: Tensor = self.head(x + torch.sigmoid(self.moe(x)))
        return scores


def build() -> tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, str]]]:
    """The model (seeded random weights, float32, eval mode), an input to trace it with, and its free axes."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FrameTagger().eval()
    inputs = {"frames": torch.randn(3, 7, 16, generator=generator)}
    return model, inputs, {"frames": {0: "batch", 1: "time"}}
