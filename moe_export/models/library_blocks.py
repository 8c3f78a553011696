"""MoE blocks of transformers that do not go through its experts interface.

A :class:`LibraryBlock` says how one module class runs as our ops while it is traced, and how its routing is
read from a plain run of the model's own code. The blocks of a family are in its module of
:mod:`moe_export.models.patches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .adapters import StackedExperts
from .experts import experts_forward

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIX = "_moe_export_"


@dataclass(frozen=True)
class Routed:
    """What one MoE block did in a plain run: ``hidden`` and ``output`` [T, H], ``expert_ids`` and
    ``weights`` [T, K].

    ``output`` is the combined output of the routed experts, without shared or identity experts.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class LibraryBlock:
    """One module class of transformers.

    ``stack(module)``: the experts' weights in the layout of the ops.
    ``forward(module, run, *args)``: the module's forward with its experts computed by ``run(hidden, ids,
    weights)``. ``routed(module, args, output)``: what a plain run of the module routed and computed.
    ``activate(module, rows)``: [M, 2I] (gate, then up) or [M, I] → [M, I].
    """

    stack: Callable[[Any], StackedExperts]
    forward: Callable[..., Any]
    routed: Callable[[Any, tuple[Any, ...], Any], Routed]
    activate: Callable[[Any, torch.Tensor], torch.Tensor]
    drops: bool = False


def library_blocks(model: nn.Module) -> dict[str, tuple[nn.Module, LibraryBlock]]:
    """Module name → (module, block) for every such module of ``model``, in module order."""
    from .patches import family_blocks

    blocks = family_blocks(model)
    return {name: (m, blocks[type(m).__name__]) for name,
            m in model.named_modules() if type(m).__name__ in blocks}


@contextmanager
def library_blocks_as_ops(model: nn.Module) -> Iterator[None]:
    """Inside, every such module of ``model`` runs its experts as our ops; restored on exit."""

    def replace(module: nn.Module, name: str, block: LibraryBlock) -> None:
        stacked = block.stack(module)
        for key in ("up", "down", "up_bias", "down_bias"):
            module.register_buffer(PREFIX + key, getattr(stacked, key), persistent=False)

        def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            weight = {key: getattr(module, PREFIX + key) for key in ("up", "down", "up_bias", "down_bias")}
            return experts_forward(
                hidden, ids, weights, weight["up"], weight["down"], lambda rows: block.activate(module, rows),
                layer=name, drops=block.drops, up_bias=weight["up_bias"], down_bias=weight["down_bias"],
            )

        module.forward = lambda *args: block.forward(module, run, *args)

    def restore(module: nn.Module) -> None:
        del module.forward
        for key in ("up", "down", "up_bias", "down_bias"):
            delattr(module, PREFIX + key)

    with ExitStack() as stack:
        for name, (module, block) in library_blocks(model).items():
            replace(module, name, block)
            stack.callback(restore, module)
        yield


@contextmanager
def library_blocks_watched(model: nn.Module, add: Callable[[str, Routed], None]) -> Iterator[None]:
    """Inside, every run of such a module calls ``add(its name, what it routed)``; the model's own code
    runs.
    """
    with ExitStack() as stack:
        for name, (module, block) in library_blocks(model).items():

            def record(m: nn.Module, args: tuple[Any, ...], output: Any, *,
                       name: str = name, block: LibraryBlock = block) -> None:
                add(name, block.routed(m, args, output))

            stack.callback(module.register_forward_hook(record).remove)
        yield
