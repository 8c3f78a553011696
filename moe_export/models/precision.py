"""A model in float16, as transformers itself would load it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def as_float16(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float16.

    In a model of transformers what the family keeps in float32 stays so (selection biases, some routers and
    norms), and
    so do buffers that no checkpoint holds: rotary frequencies rounded to float16 turn far positions by whole
    radians.
    """
    copied: Any = copy.deepcopy(model)
    if not hasattr(model, "_get_dtype_plan"):
        return copied.half()
    import torch

    kept = float32_names(model)
    for name, parameter in copied.named_parameters():
        if parameter.is_floating_point() and name not in kept:
            parameter.data = parameter.data.half()
    stored = set(copied.state_dict())
    for name, buffer in copied.named_buffers():
        if buffer.is_floating_point() and name in stored and name not in kept:
            buffer.data = buffer.data.half()
    copied.config.dtype = torch.float16
    return copied


def float32_names(model: Any, dtype: str = "float16") -> set[str]:
    """Parameters and buffers that a family of transformers keeps in float32 when the rest is ``dtype``."""
    import torch

    if not hasattr(model, "_get_dtype_plan"):
        return set()
    plan = model._get_dtype_plan(getattr(torch, dtype))
    if not plan:
        return set()
    from transformers.core_model_loading import build_glob_alternation

    pattern = build_glob_alternation(list(plan))[0]
    return {name for name in model.state_dict() if pattern.search(name)}
