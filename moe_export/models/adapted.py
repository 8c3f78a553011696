"""Blocks with an adapter, run as our ops; and the check that they then still compute what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .adapters import MoEBlockSpec, spec_of, stack_experts
from .experts import experts_forward

if TYPE_CHECKING:
    import torch
    from torch import nn

_BUFFERS = ("up", "down", "up_bias", "down_bias")
_PREFIX = "_moe_export_"

TOLERANCE = {"float32": 1e-4, "float16": 3e-2}
"""Largest difference between a block and its adapted form, relative to its largest output (at least 1): the
order of the sums differs, nothing else does."""


def adapted_blocks(model: nn.Module) -> dict[str, tuple[nn.Module, MoEBlockSpec]]:
    """Module name → (block, spec) of every block with an adapter, in module order."""
    found = ((name, block, spec_of(block)) for name, block in model.named_modules())
    return {name or type(block).__name__: (block, spec) for name, block, spec in found if spec is not None}


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states a block was called with: its first argument."""
    hidden: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return hidden


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """Inside, every block of ``model`` with a spec runs its experts as our ops; restored on exit.

    Raises:
        UsageError: a spec does not fit its block.
    """
    with ExitStack() as stack:
        for name, (block, spec) in adapted_blocks(model).items():
            stack.enter_context(_adapted(block, name, spec))
        yield


@contextmanager
def _adapted(block: nn.Module, name: str, spec: MoEBlockSpec) -> Iterator[None]:
    stacked = stack_experts(block, spec)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = block_input(args, kwargs)
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, ids = spec.routing(block, hidden)
        up, down, up_bias, down_bias = (getattr(block, _PREFIX + key) for key in _BUFFERS)
        combined = experts_forward(
            flat, ids, weights, up, down, spec.activate, layer=name, up_bias=up_bias, down_bias=down_bias
        )
        if spec.after is not None:
            combined = spec.after(block, flat, combined)
        result = combined.reshape(hidden.shape)
        return spec.output(block, result) if spec.output is not None else result

    own = block.__dict__.get("forward")
    for key in _BUFFERS:
        block.register_buffer(_PREFIX + key, getattr(stacked, key), persistent=False)
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
        for key in _BUFFERS:
            delattr(block, _PREFIX + key)


def check_adapters(model: nn.Module, run: Callable[[], Any]) -> None:
    """Run ``model`` once and compare each adapted block with itself: the spec must say all that the block
    does.

    Args:
        run: runs the model on a sample.

    Raises:
        UsageError: a block computes something else with its adapter, or something else at every call.
    """
    import torch

    blocks = adapted_blocks(model)
    if not blocks:
        return
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, (block, _) in blocks.items():

            def keep(
                _block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, *, name: str = name
            ) -> None:
                calls.setdefault(name, _cloned((args, kwargs, out)))

            hooks.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
        run()
    with torch.no_grad():
        for name, (args, kwargs, out) in calls.items():
            block = blocks[name][0]
            if why := _difference(block.forward(*_cloned(args), **_cloned(kwargs)), out):
                raise UsageError(
                    f"{name} ({type(block).__name__}): two runs on the same input differ ({why}); a block "
                    "must "
                    "compute the same at every call in eval mode, so switch its noise off there"
                )
        with adapted(model):
            for name, (args, kwargs, out) in calls.items():
                block = blocks[name][0]
                if why := _difference(block.forward(*_cloned(args), **_cloned(kwargs)), out):
                    raise UsageError(
                        f"{name} ({type(block).__name__}): the block and its adapter compute different "
                        f"things: {why}. "
                        "Compare the MoEBlockSpec with the block's forward: activation, gate_proj and "
                        "up_proj (is one "
                        "taken for the other?), route, after (shared experts, scaling), output"
                    )


def _cloned(value: Any) -> Any:
    import torch

    return torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value)


def _difference(got: Any, want: Any) -> str:
    """Why two results of a block are not the same; empty when they are."""
    import torch

    flat_got, shape_got = torch.utils._pytree.tree_flatten(got)
    flat_want, shape_want = torch.utils._pytree.tree_flatten(want)
    if shape_got != shape_want:
        return f"the result is {_structure(got)}, expected {_structure(want)}"
    for index, (a, b) in enumerate(zip(flat_got, flat_want, strict=True)):
        where = f"result {index}: " if len(flat_want) > 1 else ""
        if not isinstance(b, torch.Tensor):
            if a != b:
                return f"{where}{a!r}, expected {b!r}"
            continue
        if not isinstance(a, torch.Tensor) or a.shape != b.shape:
            return f"{where}shape {list(getattr(a, 'shape', []))}, expected {list(b.shape)}"
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        bound = TOLERANCE["float16" if b.dtype in (torch.float16, torch.bfloat16) else "float32"]
        error = float((a.double() - b.double()).abs().max()) if b.numel() else 0.0
        if not error <= bound * scale:
            return f"{where}largest difference {error:.3g} where values go up to {scale:.3g}"
    return ""


def _structure(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
