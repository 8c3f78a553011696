"""What a stack of expert matrices is made of, where its matrices lie apart in the checkpoint."""

from __future__ import annotations

EXPERT_TENSORS = "moe_export.expert_tensors"
"""Key of ``tensor.meta``: the external tensors of each part (gate and up, or one projection), by expert."""
