"""What a stack of expert matrices is made of, where its matrices lie apart in the checkpoint."""

from __future__ import annotations

EXPERT_TENSORS = "moe_export.expert_tensors"
"""Key of ``tensor.meta``: the external tensors of each part (gate and up, or one projection), by expert."""
EXPERT_SCALES = "moe_export.expert_scales"
"""Key of ``tensor.meta``: of each part whose matrices are float8, the scales of all experts' blocks as one
tensor [E, ·, ·], and the rows and columns of a block; None of a part of floats."""
SCALE_OF = "moe_export.scale_of"
"""Key of ``tensor.meta``: these numbers scale other weights and are never rounded."""
