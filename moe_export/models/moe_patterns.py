"""Blocks that look like a Mixture of Experts and have no adapter: refused, with the adapter to write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .adapters import ACTIVATIONS, ADAPTERS, NOT_MOE, spec_of
from .experts import is_experts_module

if TYPE_CHECKING:
    from torch import nn

_IN_SEQUENCE = re.compile(r"(^|_)(layers?|blocks?|stages?|stack|h)$")
"""Names of lists whose members run one after another: a model of N layers with N classes is no MoE."""


def _lists(module: nn.Module, depth: int, prefix: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    """(attribute path, members) of the lists of modules ``depth`` levels inside ``module``."""
    from torch import nn

    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            if depth == 1 and not _IN_SEQUENCE.search(name):
                members = child.values() if isinstance(child, nn.ModuleDict) else child
                yield f"{prefix}{name}", list(members)
        elif depth > 1:
            yield from _lists(child, depth - 1, f"{prefix}{name}.")


def looks_like_moe(module: nn.Module, depth: int = 1) -> tuple[str, int] | None:
    """(attribute path of the experts, their number) if ``module`` has two or more modules of one class in a
    list and, outside them, a router: a matrix with one row or column per expert.

    Nearly every hand-written MoE block looks so. A list deeper than ``depth`` 1 must be called experts.
    """
    for path, members in _lists(module, depth):
        if len(members) < 2 or len({type(m) for m in members}) != 1:
            continue
        if depth > 1 and "expert" not in path.lower():
            continue
        inside = {id(p) for m in members for p in m.parameters()}
        if not inside:
            continue
        for parameter in module.parameters():
            if id(parameter) not in inside and parameter.dim() == 2 and len(members) in parameter.shape:
                return path, len(members)
    return None


def require_adapters(model: nn.Module, *, library: str = "transformers") -> None:
    """Refuse a model with a block that looks like an MoE and has no adapter.

    Raises:
        UnsupportedModelError: the message shows the adapter to write.
    """
    covered: set[int] = set()
    for name, block in model.named_modules():
        if spec_of(block) is None:
            continue
        _refuse_other_forward(name, block)
        covered |= {id(m) for m in block.modules()}
    # The list of experts lies in the block itself, or in a module of its own inside the block.
    for depth in (1, 2):
        for name, block in model.named_modules():
            if id(block) in covered or is_experts_module(block) or type(block) in NOT_MOE:
                continue
            if type(block).__module__.startswith(f"{library}."):
                continue
            found = looks_like_moe(block, depth)
            if found is None:
                continue
            within = block.get_submodule(found[0]).modules()
            owner = block.get_submodule(found[0].rpartition(".")[0])
            if type(owner) not in NOT_MOE and not any(id(m) in covered for m in within):
                raise UnsupportedModelError(_adapter_to_write(name, block, *found))


def _refuse_other_forward(name: str, block: nn.Module) -> None:
    """A subclass with its own forward does what its base class's spec does not know."""
    for cls in type(block).__mro__:
        if cls in ADAPTERS:
            if type(block).forward is not cls.forward:  # type: ignore[attr-defined]
                raise UnsupportedModelError(
                    f"{name or type(block).__name__}: {type(block).__name__} has its own forward, and the "
                    "adapter is "
                    f"that of its base class {cls.__name__}; register a MoEBlockSpec for "
                    f"{type(block).__name__}"
                )
            return


def _adapter_to_write(name: str, block: nn.Module, experts: str, count: int) -> str:
    from torch import nn

    cls = type(block).__name__
    container = block.get_submodule(experts)
    first = next(iter(container.children()))
    linears = ", ".join(n for n, m in first.named_modules() if isinstance(m, nn.Linear)) or "none"
    return (
        f"{name or cls} ({cls}) looks like a Mixture of Experts ({count} experts in {experts!r}) and has no "
        "adapter; tracing it would bake in the experts that the sample hits, or run all of them. Describe "
        "it:\n\n"
        f"    from moe_export import MoEBlockSpec, register_moe_block\n\n"
        f"    register_moe_block({cls}, MoEBlockSpec(\n"
        f"        experts={experts!r},\n"
        f"        gate_proj=...,  # nn.Linear of an expert (it has: {linears}), None if ungated\n"
        f"        up_proj=...,\n"
        f"        down_proj=...,\n"
        f'        activation="silu",  # one of {", ".join(ACTIVATIONS)}\n'
        f"        top_k=2,\n"
        "        route=lambda block, hidden: (weights, expert_ids),  # both [T, K], by the block's own "
        "router\n"
        f"    ))\n\n"
        f"(docs/own-modules.md explains each field), or, if it is no MoE:\n\n"
        f"    from moe_export.models.adapters import NOT_MOE\n\n"
        f"    NOT_MOE.add({cls})"
    )
