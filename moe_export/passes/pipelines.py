"""Which passes run for which target, in order."""

from __future__ import annotations

from typing import Literal

from ..errors import UsageError, choices_text
from .attach_router import AttachRouter
from .base import Pass, PassContext
from .bfloat16_products import BFloat16Products
from .bfloat16_weights import BFloat16Weights
from .cached_attention import CachedAttention
from .causal_masks import CausalMasks
from .dist_collectives import DistCollectives
from .divide_experts import DivideExperts
from .expert_matrices import ExpertMatrices
from .fuse_experts import FuseExperts
from .inline_bodies import InlineBodies
from .library_fusions import LibraryFusions
from .merge_reshapes import MergeReshapes
from .mixed_norms import SplitMixedNorms
from .native_experts import NativeExperts
from .plugin_experts import PluginExperts
from .quantize_experts import QuantizeExperts
from .unroll_experts import UnrollExperts

_TENSORRT: tuple[type[Pass], ...] = (
    AttachRouter,
    DivideExperts,
    PluginExperts,
    NativeExperts,
    DistCollectives,
    InlineBodies,
    BFloat16Products,
)
"""Both TensorRT targets. No pass of ONNX Runtime's contrib ops: TensorRT's parser knows none of them, and its
own compiler fuses norms and attention."""

PIPELINES: dict[str, tuple[type[Pass], ...]] = {
    "portable": (AttachRouter, ExpertMatrices, BFloat16Weights),
    "onnxruntime": (
        AttachRouter,
        CachedAttention,
        LibraryFusions,
        SplitMixedNorms,
        CausalMasks,
        MergeReshapes,
        DivideExperts,
        QuantizeExperts,
        FuseExperts,
        UnrollExperts,
        BFloat16Weights,
    ),
    "tensorrt-rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
}
"""Target → its passes. A pass may rely on those before it."""


def run_pipeline(target: str, context: PassContext, part: Literal["all", "shared", "rank"] = "all") -> None:
    """Run the passes of ``target`` on ``context``.

    ``part``: of an expert-parallel model, ``shared`` are those before the experts are divided, the same for
    all ranks; ``rank`` are the others.

    Raises:
        UsageError: no such target.
    """
    if target not in PIPELINES:
        raise UsageError(f"unknown target {target!r}; {choices_text(target, PIPELINES)}")
    passes = PIPELINES[target]
    divided = passes.index(DivideExperts) if DivideExperts in passes else len(passes)
    chosen = {"all": passes, "shared": passes[:divided], "rank": passes[divided:]}[part]
    for cls in chosen:
        cls().apply(context)
