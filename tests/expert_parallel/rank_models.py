"""Small models with enough experts for many ranks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moe_export.models.families import family
from moe_export.models.families.tiny import build_tiny

if TYPE_CHECKING:
    import torch

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configurations call the number of experts."""


def model_with(name: str, experts: int) -> torch.nn.Module:
    """A tiny model of family ``name`` whose MoE layers have ``experts`` experts."""
    entry = family(name)
    known = [key for key in COUNTS if key in entry.tiny]
    assert known, f"{name}: none of {COUNTS} in {sorted(entry.tiny)}"
    return build_tiny(dataclasses.replace(entry, tiny={**entry.tiny, known[0]: experts}))
