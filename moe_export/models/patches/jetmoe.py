"""JetMoE: experts stored as [E, out, in]; attention has experts too, whose queries and outputs pass through
our ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...ops.torch_ops import torch_ops
from ..adapters import StackedExperts
from ..library_blocks import LibraryBlock, Routed


def _choose(router: Any, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and weights, both [T, K]."""
    top, ids = router.layer(flat).float().topk(router.top_k, dim=1)
    return ids, torch.softmax(top, dim=1).type_as(flat)


def _stack(block: Any) -> StackedExperts:
    return StackedExperts(block.input_linear.weight.detach(), block.output_linear.weight.detach(), None, None)


def _forward(block: Any, run: Any, hidden: torch.Tensor) -> torch.Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    ids, weights = _choose(block.router, flat)
    return run(flat, ids, weights).reshape(hidden.shape) + block.bias


def _routed(block: Any, args: tuple[Any, ...], output: torch.Tensor) -> Routed:
    flat = args[0].reshape(-1, args[0].shape[-1])
    ids, weights = _choose(block.router, flat)
    return Routed(flat, ids, weights, (output - block.bias).reshape(flat.shape))


def _activate(block: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return block.activation(gate) * up


BLOCKS = {"JetMoeMoE": LibraryBlock(_stack, _forward, _routed, _activate)}


def _attention_experts(experts: Any) -> tuple[Any, Any]:
    """``map`` (hidden to the queries of each token's K experts) and ``reduce`` (attention output to hidden).

    Rows are sorted by expert, multiplied per expert, and put back into token order, once on each side of
    attention.
    """
    matmul = torch_ops().grouped_matmul

    def map_(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        ids, weights = _choose(experts.router, flat)
        owner = ids.reshape(-1)
        order = torch.argsort(owner)
        offsets = (owner.unsqueeze(0) < torch.arange(experts.num_experts + 1).unsqueeze(1)).sum(dim=1)
        back = torch.argsort(order)
        rows = flat[torch.div(order, experts.top_k, rounding_mode="floor")]
        queries = matmul(rows, experts.input_linear.weight, offsets, False)[back]
        return queries.reshape(*hidden.shape[:2], experts.top_k, -1), flat, (order, back, offsets, weights)

    def reduce(rows: torch.Tensor, chosen: Any) -> torch.Tensor:
        order, back, offsets, weights = chosen
        flat = rows.reshape(-1, rows.shape[-1])
        out = matmul(flat[order], experts.output_linear.weight, offsets, False)[back]
        out = out.reshape(-1, experts.top_k, out.shape[-1]) * weights.unsqueeze(-1)
        return out.sum(dim=1).reshape(*rows.shape[:2], -1) + experts.bias

    return map_, reduce


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace ``map`` and ``reduce`` of the attention experts."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__ == "JetMoeMoA":
                module.map, module.reduce = _attention_experts(module)
                stack.callback(module.__dict__.pop, "map")
                stack.callback(module.__dict__.pop, "reduce")
        yield
