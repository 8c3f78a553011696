"""A model whose large weights take address space and no memory, for tracing checkpoints of any size.

Tracing needs shapes, not values. Large parameters are views of a private mapping that nobody writes: the
kernel gives it no page, and to PyTorch it is an ordinary tensor of zeros. Small ones are read from the
checkpoint, because optimisers fold them into constants, and what the code computes for itself (tables of
rotary frequencies) is computed.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import EnvironmentLacksError, SourceError

if TYPE_CHECKING:
    import torch

    from .checkpoint import CheckpointInfo
    from .weight_sources import StoredWeights

SMALL = 1 << 20
"""Elements up to which a parameter is read: more than any optimiser folds (onnxscript: 512 * 512)."""
_MAP_NORESERVE = 0x4000
"""linux/mman.h, the same on x86-64 and aarch64: the mapping does not count against the memory there is."""


def hollow_tensor(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros that takes no memory as long as nobody writes to it.

    Raises:
        EnvironmentLacksError: this system cannot reserve the address space.
    """
    import math

    import torch

    sizes = tuple(shape)
    count = math.prod(sizes)
    if count == 0:
        return torch.zeros(sizes, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= _MAP_NORESERVE
    try:
        space = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except OSError as error:
        raise EnvironmentLacksError(
            f"no address space for a weight of shape {list(sizes)} ({error.strerror}); raise `ulimit -v`"
        ) from error
    return torch.frombuffer(space, dtype=dtype, count=count).view(sizes)


def hollow_model(
    cls: Any,
    config: Any,
    checkpoint: CheckpointInfo,
    options: Mapping[str, Any] | None = None,
    *,
    whole: bool = False,
) -> tuple[Any, StoredWeights]:
    """A float32 model of class ``cls`` in eval mode, and where each of its weights comes from.

    Parameters of more than :data:`SMALL` elements are zeros that take no memory; with ``whole``, all are
    read, and dequantised where the checkpoint holds them quantised.

    Raises:
        SourceError: the checkpoint does not fit the model. EnvironmentLacksError: no address space.
    """
    import torch

    from .weight_sources import stored_weights

    with torch.device("meta"):
        model = cls._from_config(config, dtype=torch.float32, **(options or {}))
    stored = stored_weights(model, checkpoint)
    for name, tensor in list(model.state_dict(keep_vars=True).items()):
        small = whole or tensor.numel() <= SMALL or not tensor.is_floating_point()
        value = stored.weight(name) if small else hollow_tensor(tensor.shape, torch.float32)
        if tuple(value.shape) != tuple(tensor.shape):
            raise SourceError(
                f"{checkpoint.folder}: {name} is {list(value.shape)} in the weight files, the model has "
                f"{list(tensor.shape)}; correct config.json"
            )
        _put(model, name, value.to(torch.float32) if tensor.is_floating_point() else value)
    _compute_buffers(model)
    model.tie_weights()
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if left:
        raise SourceError(f"{checkpoint.folder}: nothing says what {left[0]} holds")
    return model.eval(), stored


def _put(model: Any, name: str, value: torch.Tensor) -> None:
    import torch

    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        module._parameters[own] = torch.nn.Parameter(value, requires_grad=False)
        value = module._parameters[own]
    else:
        module._buffers[own] = value
    value._is_hf_initialized = True  # what transformers marks loaded weights by


def _compute_buffers(model: Any) -> None:
    """Let transformers fill in what no checkpoint holds, as its own loader does."""
    import torch

    for name, buffer in model.named_non_persistent_buffers():
        path, _, own = name.rpartition(".")
        model.get_submodule(path)._buffers[own] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
