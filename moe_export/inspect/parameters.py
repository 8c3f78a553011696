"""How many parameters a model has and how many of them one token uses.

Vendors count differently, so three numbers are given: all parameters; the active ones (everything but the
routed experts, plus the chosen K of every layer's E); and the active ones without the input embedding
matrix, of which a token reads one row. A matrix that two modules share is one matrix: it is counted once,
and when the output head shares the input embeddings, leaving out the embeddings leaves out that one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from moe_export.inspect.layers import ExpertBlock, find_expert_blocks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters. The active ones are None where a layer's K is unknown (``note`` says which)."""

    total: int
    active: int | None
    active_without_embeddings: int | None
    routed_experts: int
    embeddings: int
    tied_embeddings: bool = False
    note: str = ""

    def manifest_entry(self) -> dict[str, int]:
        """The three public numbers, those known, as the manifest of a bundle keeps them."""
        known = {
            "total": self.total,
            "active": self.active,
            "active_without_embeddings": self.active_without_embeddings,
        }
        return {name: value for name, value in known.items() if value is not None}


def count_parameters(
    model: torch.nn.Module, config: Any = None, blocks: tuple[ExpertBlock, ...] | None = None
) -> ParameterCount:
    """Count the parameters of ``model``, which may be on the meta device.

    ``config`` helps to find K, ``blocks`` saves the search for expert blocks.
    """
    if blocks is None:
        blocks = find_expert_blocks(model, config)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(block.parameters for block in blocks)
    table = _input_embeddings(model)
    embeddings = 0 if table is None else table.numel()
    tied = (
        table is not None
        and sum(any(p is table for p in module.parameters(recurse=False)) for module in model.modules()) > 1
    )
    unknown = [block.name for block in blocks if block.top_k is None]
    if unknown:
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        note = f"experts per token of {unknown[0]}{more} unknown"
        return ParameterCount(total, None, None, routed, embeddings, tied, note)
    # With C choices, N of them with weights: K of C are chosen, each choice has 1/N of the usable weights.
    used = sum((Fraction(b.usable_parameters * b.top_k, b.choices) for b in blocks if b.top_k), Fraction(0))
    active = total - routed + round(used)
    return ParameterCount(total, active, active - embeddings, routed, embeddings, tied)


def _input_embeddings(model: torch.nn.Module) -> torch.nn.Parameter | None:
    """The matrix of input embeddings; None when the model has none or does not say."""
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return None
    try:
        module = get()
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(module, "weight", None)
    import torch

    if isinstance(module, torch.nn.Embedding) and isinstance(weight, torch.nn.Parameter):
        return weight
    return None
