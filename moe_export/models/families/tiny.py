"""Small random models of a family, made so that a comparison of two of them means something.

A freshly initialised model hides mistakes: norms are one, biases and selection biases zero, routers nearly
uniform, and some classes leave expert weights uninitialised. :func:`build_tiny` gives every parameter its own
random values, scaled so that activations stay near one and routing varies from token to token.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from moe_export.models.families.entry import Family


def model_class_of(name: str) -> Any:
    """The class of transformers called ``name``.

    Raises:
        UnsupportedModelError: the installed transformers has no such class.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise UnsupportedModelError(f"transformers {transformers.__version__} has no class {name}; "
                                    "install the version that pyproject.toml names")
    return found


def build_tiny(family: Family, seed: int = 0, model_class: str | None = None) -> torch.nn.Module:
    """A small random float32 model of ``family`` in eval mode. The same ``seed`` gives the same weights.

    Raises:
        UnsupportedModelError: the family is refused, or ``model_class`` is not one of its classes.
    """
    import torch

    if family.status == "refused":
        raise UnsupportedModelError(f"family {family.name!r} is refused: {family.reason}")
    chosen = model_class or family.model_class
    if chosen not in family.classes:
        raise UnsupportedModelError(f"family {family.name!r} has no class {chosen!r}; "
                                    f"choices: {', '.join(family.classes)}")
    cls = model_class_of(chosen)
    with torch.random.fork_rng(devices=[]), _uninitialised_is_nan():
        torch.manual_seed(seed)
        model: torch.nn.Module = cls(cls.config_class(**_fresh(family.tiny))).float().eval()
    _randomise(model, seed)
    return model


def _fresh(value: Any) -> Any:
    """A deep copy: configuration classes keep and change the containers they are given."""
    if isinstance(value, dict):
        return {k: _fresh(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fresh(v) for v in value)
    return value


@contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """Within, ``torch.empty`` gives NaN instead of whatever the memory held."""
    import torch
    import torch.utils.deterministic as deterministic

    was, fill = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        deterministic.fill_uninitialized_memory = fill


def _randomise(model: torch.nn.Module, seed: int) -> None:
    import torch

    def noise(name: str, like: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        return torch.randn(like.shape, generator=generator, dtype=torch.float32)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = noise(name, parameter)
            if parameter.ndim >= 2:
                parameter.copy_(random * _std(name, parameter))
            else:
                parameter.copy_(torch.nan_to_num(parameter, nan=0.0) + 0.1 * random)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and "bias" in name.rsplit(".", 1)[-1]:
                buffer.copy_(0.1 * noise(name, buffer))
            elif name.endswith("tid2eid"):  # a table from token id to expert ids, filled by the checkpoint
                experts = model.get_submodule(name.rpartition(".")[0]).num_experts
                token, slot = torch.arange(buffer.shape[0]).unsqueeze(-1), torch.arange(buffer.shape[1])
                buffer.copy_((token * 3 + slot) % experts)


def _std(name: str, parameter: torch.Tensor) -> float:
    if "embed" in name:
        return 0.3
    fan_in = parameter[0].numel() if "conv" in name else parameter.shape[-1]
    routes = ("router" in name or name.endswith("gate.weight")) and parameter.ndim == 2
    return float((2.0 if routes else 1.0) / fan_in**0.5)
