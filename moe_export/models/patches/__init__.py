"""Per-family patches: exact, reversible rewrites of model code that cannot be traced as it is.

A patch computes what the model computes, in a form whose graph holds at every batch size and sequence
length. It is active while the model is traced, never in the reference. A module here has ``patch(model)``, a
context manager, or ``BLOCKS``, the family's MoE blocks that do not go through the experts interface, or both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ..library_blocks import LibraryBlock

PATCHES: dict[str, str] = {
    "aria": "aria",
    "bailing_hybrid": "delta_rule",
    "dbrx": "dbrx",
    "deepseek_v2": "complex_rope",
    "doge": "doge",
    "glm5_next": "delta_rule",
    "granitemoehybrid": "mamba",
    "inkling2": "inkling2",
    "jamba": "mamba",
    "jetmoe": "jetmoe",
    "kimi_linear": "delta_rule",
    "llama4": "llama4",
    "longcat_flash": "longcat_flash",
    "minimax": "minimax",
    "minimax_m3_vl": "minimax_m3_vl",
    "nemotron_h": "mamba",
    "phimoe": "phimoe",
    "qwen3_5_moe": "delta_rule",
    "qwen3_next": "delta_rule",
    "qwen4_exp": "delta_rule",
    "step3p7": "step3p7",
    "switch_transformers": "switch_transformers",
    "zaya": "zaya",
}
"""Family name → module of this package with its ``patch``, its ``BLOCKS``, or both."""


def _module_of(family: str | None) -> Any:
    if family is None or family not in PATCHES:
        return None
    return importlib.import_module(f"{__name__}.{PATCHES[family]}")


STEP_DIFFERS: dict[str, str] = {
    "nemotron_h": "its step for one token leaves out the limit of the time step that its full pass applies",
}
"""Family name → why transformers' step for one token gives other numbers than its pass over all tokens, which
is what an engine computes."""

IDLE_PARTS: dict[str, tuple[str, ...]] = {"ernie4_5_vl_moe": ("vision_moe",)}
"""Family name → names of submodules whose experts no text token reaches."""


def _family_of(model: nn.Module) -> str | None:
    parts = type(model).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else None


def idle_parts(model: nn.Module) -> set[str]:
    """Names of submodules of the model's family whose experts no text token reaches."""
    return set(IDLE_PARTS.get(_family_of(model) or "", ()))


def step_differs(model: nn.Module) -> str:
    """Why one token at a time gives other numbers in the model itself; empty when it does not."""
    return STEP_DIFFERS.get(_family_of(model) or "", "")


def family_blocks(model: nn.Module) -> dict[str, LibraryBlock]:
    """Class name → block for the MoE blocks of the model's family that are outside the experts interface."""
    return dict(getattr(_module_of(_family_of(model)), "BLOCKS", {}))


@contextmanager
def family_patches(family: str | None, model: nn.Module) -> Iterator[None]:
    """Activate the family's patch, if it has one, and run its own MoE blocks as our ops."""
    from ..library_blocks import library_blocks_as_ops

    patch = getattr(_module_of(family), "patch", None)
    with ExitStack() as stack:
        if patch is not None:
            stack.enter_context(patch(model))
        stack.enter_context(library_blocks_as_ops(model))
        yield


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Inside, attributes of ``owner`` (a module or class) have ``values``; names it lacks are left alone."""
    before = {name: getattr(owner, name) for name in values if hasattr(owner, name)}
    try:
        for name in before:
            setattr(owner, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def replaced_forwards(model: nn.Module, class_name: str,
                      make: Callable[[nn.Module, str], Any]) -> Iterator[None]:
    """Inside, every module of ``model`` of class ``class_name`` has ``make(module, its name)`` as its
    forward.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if type(module).__name__ == class_name:
                module.forward = make(module, name)
                stack.callback(module.__dict__.pop, "forward")
        yield


def modeling_module(model: nn.Module) -> Any:
    """The Python module of transformers that defines the model's class."""
    return importlib.import_module(type(model).__module__)
