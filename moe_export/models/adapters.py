"""Adapters: how a block that is not from ``transformers`` says that it is a Mixture of Experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, choices_text

if TYPE_CHECKING:
    import torch
    from torch import nn

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")

Route = Callable[["nn.Module", "torch.Tensor"], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class MoEBlockSpec:
    """What an MoE block is made of.

    ``experts``: attribute path of the ``nn.ModuleList`` or ``nn.ModuleDict`` of experts, all of one class.
    ``route(block, hidden)``: routing weights [T, K] (float) and expert ids [T, K] (int; -1 = dropped),
    computed by the block's own router code; ``hidden`` is [T, H] (with ``flatten=False``: as the block got
    it). The weight of a dropped assignment does not matter.
    ``up_proj``, ``down_proj``, ``gate_proj``: names of the ``nn.Linear`` inside one expert; without
    ``gate_proj`` an expert is ``down(f(up(x)))``, with it ``down(f(gate(x)) * up(x))``.
    ``activation``: one of :data:`ACTIVATIONS` or a function of a tensor.
    ``after(block, hidden, combined)``: what the block does with the experts' sum (shared experts, residual),
    on [T, H].
    ``output(block, result)``: what the block returns, made from the result in the input's shape; default: the
    result.
    """

    experts: str
    route: Route
    up_proj: str
    down_proj: str
    top_k: int | str
    gate_proj: str | None = None
    activation: str | Callable[[torch.Tensor], torch.Tensor] = "silu"
    after: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    output: Callable[[nn.Module, torch.Tensor], Any] | None = None
    flatten: bool = True

    def __post_init__(self) -> None:
        for name in ("experts", "up_proj", "down_proj", "gate_proj"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (name == "gate_proj" and value is None):
                raise UsageError(f"MoEBlockSpec.{name}: expected the name of an attribute, got {value!r}")
        for name, signature in (
            ("route", "(block, hidden) -> (weights, expert_ids)"),
            ("after", "(block, hidden, combined) -> tensor"),
            ("output", "(block, result) -> what the block returns"),
        ):
            value = getattr(self, name)
            if not callable(value) and not (name != "route" and value is None):
                raise UsageError(f"MoEBlockSpec.{name}: expected a function {signature}, got {value!r}")
        if not callable(self.activation) and self.activation not in ACTIVATIONS:
            raise UsageError(
                f"MoEBlockSpec.activation: unknown {self.activation!r}; "
                f"{choices_text(str(self.activation), ACTIVATIONS)}; or a function of a tensor"
            )
        if type(self.top_k) is int and self.top_k < 1:
            raise UsageError(f"MoEBlockSpec.top_k: expected at least 1, got {self.top_k}")
        if type(self.top_k) not in (int, str) or not self.top_k:
            raise UsageError(
                f"MoEBlockSpec.top_k: expected a number or the name of an attribute, got {self.top_k!r}"
            )

    def expert_list(self, block: nn.Module) -> list[nn.Module]:
        """The block's experts in order.

        Raises:
            UsageError: ``experts`` does not name a list of modules of one class.
        """
        from torch import nn

        container = _attribute(block, self.experts)
        if isinstance(container, nn.ModuleDict):
            experts = list(container.values())
        elif isinstance(container, nn.ModuleList):
            experts = list(container)
        else:
            raise UsageError(
                f"{type(block).__name__}.{self.experts}: expected nn.ModuleList or nn.ModuleDict, "
                f"got {type(container).__name__}"
            )
        if not experts or len({type(e) for e in experts}) != 1:
            raise UsageError(f"{type(block).__name__}.{self.experts}: expected experts of one class")
        return experts

    def chosen_per_token(self, block: nn.Module) -> int:
        """K, read from the block where ``top_k`` names an attribute.

        Raises:
            UsageError: the attribute is missing or no number of 1 or more.
        """
        value = _attribute(block, self.top_k) if isinstance(self.top_k, str) else self.top_k
        if type(value) is not int or value < 1:
            raise UsageError(
                f"{type(block).__name__}.{self.top_k}: expected a whole number of 1 or more, got {value!r}"
            )
        return value

    def routing(self, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, K] (0 where dropped) and expert ids [T, K] that ``route`` gives for the block's input.

        Raises:
            UsageError: ``route`` returns something else.
        """
        import torch

        made = self.route(block, hidden.reshape(-1, hidden.shape[-1]) if self.flatten else hidden)
        name, top_k = f"the route function of {type(block).__name__}", self.chosen_per_token(block)
        if not (
            isinstance(made, tuple) and len(made) == 2 and all(isinstance(t, torch.Tensor) for t in made)
        ):
            raise UsageError(f"{name}: expected two tensors (weights, expert_ids), got {_described(made)}")
        weights, ids = made
        if ids.is_floating_point() or ids.dtype == torch.bool or not weights.is_floating_point():
            raise UsageError(
                f"{name}: expected weights of float type, then expert ids of int type, got "
                f"{weights.dtype} and {ids.dtype}"
            )
        for what, tensor in (("weights", weights), ("expert_ids", ids)):
            if tensor.dim() != 2 or tensor.shape[1] != top_k:
                raise UsageError(
                    f"{name}: {what} has shape {list(tensor.shape)}, expected [tokens, {top_k}] (top_k is "
                    f"{top_k})"
                )
        return torch.where(ids >= 0, weights, 0.0), ids

    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        """[M, 2I] (gate and up) or [M, I] → [M, I]."""
        import torch

        functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "silu": torch.nn.functional.silu,
            "gelu": torch.nn.functional.gelu,
            "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
            "relu": torch.relu,
            "relu2": lambda x: torch.relu(x).square(),
            "identity": lambda x: x,
        }
        function = functions[self.activation] if isinstance(self.activation, str) else self.activation
        if self.gate_proj is None:
            return function(rows)
        gate, up = rows.chunk(2, dim=-1)
        return function(gate) * up


def _described(value: Any) -> str:
    return (
        f"{type(value).__name__} of {len(value)}"
        if isinstance(value, (tuple, list))
        else type(value).__name__
    )


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        if not hasattr(value, part):
            raise UsageError(f"{type(module).__name__}: no attribute {path!r} (stopped at {part!r})")
        value = getattr(value, part)
    return value


ADAPTERS: dict[type, MoEBlockSpec] = {}
"""Block class → spec; subclasses of a class with a spec use it too."""


def register_moe_block(cls: type, spec: MoEBlockSpec) -> None:
    """Say that ``cls`` (an ``nn.Module`` class) is an MoE block described by ``spec``.

    Raises:
        UsageError: ``cls`` is no module class or ``spec`` no MoEBlockSpec.
    """
    from torch import nn

    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UsageError(f"register_moe_block: expected a subclass of torch.nn.Module, got {cls!r}")
    if not isinstance(spec, MoEBlockSpec):
        raise UsageError(
            f"register_moe_block({cls.__name__}): expected a MoEBlockSpec, got {type(spec).__name__}"
        )
    ADAPTERS[cls] = spec


def moe_block(spec: MoEBlockSpec) -> Callable[[type], type]:
    """Class decorator form of :func:`register_moe_block`."""

    def decorate(cls: type) -> type:
        register_moe_block(cls, spec)
        return cls

    return decorate


def spec_of(module: nn.Module) -> MoEBlockSpec | None:
    """The spec registered for the module's class or the nearest base class."""
    for cls in type(module).__mro__:
        if cls in ADAPTERS:
            return ADAPTERS[cls]
    return None


@dataclass(frozen=True)
class StackedExperts:
    """Weights of experts in the layout of the ops: ``up`` [E, 2I or I, H], ``down`` [E, H, I], biases."""

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


def stack_experts(block: nn.Module, spec: MoEBlockSpec) -> StackedExperts:
    """Stack the experts' own weights.

    Raises:
        UsageError: an expert lacks a projection named in the spec, or it is not an ``nn.Linear``.
    """
    import torch
    from torch import nn

    def stack(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        linears = [_attribute(e, name) for e in spec.expert_list(block)]
        for linear in linears:
            if not isinstance(linear, nn.Linear):
                raise UsageError(
                    f"{type(block).__name__}: expert attribute {name!r} is {type(linear).__name__}, "
                    "expected nn.Linear"
                )
        kinds = {(tuple(linear.weight.shape), linear.bias is None) for linear in linears}
        if len(kinds) != 1:
            raise UsageError(
                f"{type(block).__name__}: {name!r} differs from expert to expert in shape or bias; experts "
                "of one "
                "block must have one shape"
            )
        weight = torch.stack([linear.weight.detach() for linear in linears])
        if linears[0].bias is None:
            return weight, None
        return weight, torch.stack([linear.bias.detach() for linear in linears])

    up, up_bias = stack(spec.up_proj)
    if spec.gate_proj is not None:
        gate, gate_bias = stack(spec.gate_proj)
        up = torch.cat([gate, up], dim=1)
        if (gate_bias is None) != (up_bias is None):
            raise UsageError(
                f"{type(block).__name__}: gate and up projection must both have a bias or neither"
            )
        up_bias = None if up_bias is None or gate_bias is None else torch.cat([gate_bias, up_bias], dim=1)
    down, down_bias = stack(spec.down_proj)
    return StackedExperts(up, down, up_bias, down_bias)


NOT_MOE: set[type] = set()
"""Classes that look like an MoE block and are none."""
