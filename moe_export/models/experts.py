"""The experts of an MoE layer written with our ops: what every family and adapter is exported through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

HOOK_NAME = "moe_export"
LAYER_ATTRIBUTE = "_moe_export_layer"


def experts_forward(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    activate: Callable[[torch.Tensor], torch.Tensor],
    *,
    layer: str,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    transposed: bool = False,
    drops: bool = True,
    after_down: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Dispatch → grouped matmul → activation → grouped matmul → combine, as visible ops.

    Args:
        hidden: [T, H] tokens.
        expert_ids: [T, K] chosen experts; negative = dropped.
        weights: [T, K] routing weights; of a dropped assignment it does not matter.
        up: [E, 2I or I, H] gate and up projection, or up alone ([E, H, ·] when ``transposed``).
        down: [E, H, I] ([E, I, H] when ``transposed``).
        activate: [M, 2I or I] → [M, I].
        layer: name of the layer, kept in the graph.
        up_bias, down_bias: [E, ·].
        drops: False promises that every id is in [0, E).
        after_down: [M, H] → [M, H], before the weights are applied.

    Returns:
        [T, H] in the dtype of ``hidden``.
    """
    import torch

    from ..ops.torch_ops import torch_ops

    ops = torch_ops()
    take = torch.nn.functional.embedding  # becomes one Gather
    num_experts = up.shape[0]
    ids = expert_ids.to(torch.int32)
    order, offsets, tokens = ops.dispatch(ids, num_experts, drops, layer)
    rows = take(tokens, hidden)
    inner = ops.grouped_matmul(rows, up, offsets, transposed)
    if up_bias is not None or down_bias is not None:
        owner = ids.reshape(-1)[order].clamp(0, num_experts - 1)
    if up_bias is not None:
        inner = inner + take(owner, up_bias)
    inner = activate(inner)
    out = ops.grouped_matmul(inner, down, offsets, transposed)
    if down_bias is not None:
        out = out + take(owner, down_bias)
    if after_down is not None:
        out = after_down(out)
    if drops:
        # A dropped row is zero after the matmul, but a bias or a norm behind it makes it something.
        weights = torch.where((ids >= 0) & (ids < num_experts), weights, 0.0)
    return ops.combine(out, order, weights.to(torch.float32)).to(hidden.dtype)


def hook(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: ``self`` is any experts module of the library."""
    gated = self.has_gate
    biased = self.has_bias
    up = self.gate_up_proj if gated else self.up_proj
    bias_name = "gate_up_proj_bias" if gated else "up_proj_bias"
    return experts_forward(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        top_k_index,
        top_k_weights,
        up,
        self.down_proj,
        self._apply_gate if gated else self.act_fn,
        layer=getattr(self, LAYER_ATTRIBUTE, type(self).__name__),
        up_bias=getattr(self, bias_name) if biased else None,
        down_bias=self.down_proj_bias if biased else None,
        transposed=self.is_transposed,
        drops=False,
        after_down=self.post_expert_norm if self.has_post_expert_norm else None,
    ).reshape(hidden_states.shape)


def is_experts_module(module: nn.Module) -> bool:
    """Whether ``module`` dispatches through transformers' experts interface."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "down_proj")


@contextmanager
def experts_run_by(model: nn.Module, name: str, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, ``forward`` (transformers' experts interface) computes every experts module of ``model``, each
    of which knows its name; restored on exit. ``name``: what ``forward`` is registered as."""
    modules = [(path, m) for path, m in model.named_modules() if is_experts_module(m)]
    if not modules:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, forward)
    # The modules' own configs, not model.set_experts_implementation: that one works only on models of the
    # library, and
    # here they may be parts of a model of one's own.
    configs = {id(m.config): m.config for _, m in modules}
    before = [(c, c._experts_implementation_internal) for c in configs.values()]
    try:
        for path, module in modules:
            setattr(module, LAYER_ATTRIBUTE, path or type(module).__name__)
        for config in configs.values():
            config._experts_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation
        for _, module in modules:
            module.__dict__.pop(LAYER_ATTRIBUTE, None)


def experts_as_ops(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, every experts module of ``model`` runs as our ops; restored on exit."""
    return experts_run_by(model, HOOK_NAME, hook)

