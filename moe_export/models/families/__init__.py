"""Every MoE family of transformers: works, limited or refused.

:data:`FAMILIES` is plain data (reading it imports no torch). ``docs/families.md`` is generated from it and
from the measured results, and a test holds that no MoE family of the installed transformers is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_export.errors import UnsupportedModelError, choices_text
from moe_export.models.families.entry import FP32_TOLERANCE, STATUSES, Family, Status
from moe_export.models.families.hybrid import HYBRID
from moe_export.models.families.latent import LATENT
from moe_export.models.families.multimodal import MULTIMODAL
from moe_export.models.families.others import OTHERS
from moe_export.models.families.sigmoid import SIGMOID
from moe_export.models.families.softmax import SOFTMAX

if TYPE_CHECKING:
    import torch

__all__ = ["FAMILIES", "FP32_TOLERANCE", "NOT_MOE", "STATUSES", "Family", "Status", "family", "tiny_model"]

FAMILIES: dict[str, Family] = {
    f.name: f for f in sorted((*SOFTMAX, *SIGMOID, *LATENT, *HYBRID, *MULTIMODAL, *OTHERS),
                              key=lambda f: f.name)
}
"""Family name (folder in ``transformers/models``) to what is known about it."""

NOT_MOE: dict[str, str] = {
    "granite_docling": "its density router picks an image connector path per sample; there are no experts",
    "nemotron3_5_transcribe": "a speech encoder in front of a nemotron_h decoder, which is registered",
}
"""Folders of ``transformers/models`` that look like an MoE family and are none, and why."""


def family(name: str) -> Family:
    """The registered family called ``name``.

    Raises:
        UnsupportedModelError: no family has this name; the message lists the nearest ones.
    """
    found = FAMILIES.get(name)
    if found is None:
        raise UnsupportedModelError(f"unknown MoE family {name!r}; {choices_text(name, FAMILIES)}")
    return found


def tiny_model(name: str, seed: int = 0, model_class: str | None = None) -> torch.nn.Module:
    """A small random float32 model of the family ``name`` in eval mode.

    Raises:
        UnsupportedModelError: the family is unknown or refused, or ``model_class`` is not one of its classes.
    """
    from moe_export.models.families.tiny import build_tiny

    return build_tiny(family(name), seed, model_class)
