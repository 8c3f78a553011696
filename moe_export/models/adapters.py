"""Adapters: how a block that is not from ``transformers`` says that it is a Mixture of Experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError, UsageError, choices_text

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
    flatten: bool = field(default=True)

    def __post_init__(self) -> None:
        for name in ("experts", "up_proj", "down_proj"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UsageError(
                    f"MoEBlockSpec.{name}: expected the name of an attribute, got {getattr(self, name)!r}"
                )
        if not callable(self.route):
            raise UsageError(
                "MoEBlockSpec.route: expected a function (block, hidden) -> (weights, expert_ids)"
            )
        if isinstance(self.activation, str) and self.activation not in ACTIVATIONS:
            raise UsageError(
                f"MoEBlockSpec.activation: unknown {self.activation!r}; "
                f"{choices_text(self.activation, ACTIVATIONS)}"
            )
        if isinstance(self.top_k, int) and self.top_k < 1:
            raise UsageError(f"MoEBlockSpec.top_k: expected at least 1, got {self.top_k}")

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
    """Say that ``cls`` (an ``nn.Module`` class) is an MoE block described by ``spec``."""
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


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """Inside, every block of ``model`` with a spec runs its experts as our ops; restored on exit."""

    from .experts import experts_forward

    patched: list[nn.Module] = []

    def adapt(block: nn.Module, name: str, spec: MoEBlockSpec) -> None:
        stacked = stack_experts(block, spec)
        for key in ("up", "down", "up_bias", "down_bias"):
            tensor = getattr(stacked, key)
            block.register_buffer(f"_moe_export_{key}", tensor, persistent=False)

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            flat = hidden.reshape(-1, hidden.shape[-1])
            weights, ids = spec.route(block, flat if spec.flatten else hidden)
            combined = experts_forward(
                flat,
                ids,
                weights,
                block._moe_export_up,
                block._moe_export_down,
                spec.activate,  # type: ignore[arg-type]
                layer=name,
                up_bias=block._moe_export_up_bias,
                down_bias=block._moe_export_down_bias,  # type: ignore[arg-type]
            )
            if spec.after is not None:
                combined = spec.after(block, flat, combined)
            result = combined.reshape(hidden.shape)
            return spec.output(block, result) if spec.output is not None else result

        block.forward = forward  # type: ignore[method-assign]
        patched.append(block)

    try:
        for name, block in list(model.named_modules()):
            spec = spec_of(block)
            if spec is not None:
                adapt(block, name or type(block).__name__, spec)
        yield
    finally:
        for block in patched:
            del block.forward
            for key in ("up", "down", "up_bias", "down_bias"):
                delattr(block, f"_moe_export_{key}")


def looks_like_moe(module: nn.Module) -> tuple[str, int] | None:
    """(attribute of the experts, their number) if ``module`` has two or more experts of one class and a layer
    with one output per expert, which is how nearly every hand-written MoE block looks."""
    from torch import nn

    for name, child in module.named_children():
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) or len(child) < 2:
            continue
        members = list(child.values()) if isinstance(child, nn.ModuleDict) else list(child)
        if len({type(m) for m in members}) != 1 or not any(True for _ in members[0].parameters()):
            continue
        inside = {id(p) for p in child.parameters()}
        for parameter in module.parameters():
            # A router weight lies outside the experts and has one row or one column per expert.
            if id(parameter) not in inside and parameter.dim() == 2 and len(members) in parameter.shape:
                return name, len(members)
    return None


def require_adapters(model: nn.Module, *, library: str = "transformers") -> None:
    """Refuse a model with a block that looks like an MoE and has no adapter.

    Raises:
        UnsupportedModelError: the message shows the adapter to write.
    """
    from .experts import is_experts_module

    covered = {id(m) for b in model.modules() if spec_of(b) is not None for m in b.modules()}
    for name, block in model.named_modules():
        if (
            id(block) in covered
            or is_experts_module(block)
            or type(block).__module__.startswith(f"{library}.")
        ):
            continue
        found = looks_like_moe(block)
        if found is None or type(block) in NOT_MOE:
            continue
        experts, count = found
        cls = type(block).__name__
        linears = _linear_names(block, experts)
        raise UnsupportedModelError(
            f"{name or cls} ({cls}) looks like a Mixture of Experts ({count} experts in {experts!r}) and has no adapter; "
            f"tracing it would bake in the experts that the sample hits. Describe it:\n\n"
            f"    from moe_export import MoEBlockSpec, register_moe_block\n\n"
            f"    register_moe_block({cls}, MoEBlockSpec(\n"
            f"        experts={experts!r},\n"
            f"        gate_proj=...,  # nn.Linear of an expert (it has: {', '.join(linears) or 'none'}), None if ungated\n"
            f"        up_proj=...,\n"
            f"        down_proj=...,\n"
            f'        activation="silu",  # one of {", ".join(ACTIVATIONS)}\n'
            f"        top_k=2,\n"
            f"        route=lambda block, hidden: (weights, expert_ids),  # both [T, K], from the block's own router\n"
            f"    ))\n\n"
            f"or, if it is no MoE: moe_export.models.adapters.NOT_MOE.add({cls})"
        )


NOT_MOE: set[type] = set()
"""Classes that look like an MoE block and are none."""


def _linear_names(block: nn.Module, experts: str) -> list[str]:
    from torch import nn

    container = getattr(block, experts)
    first = next(iter(container.values() if isinstance(container, nn.ModuleDict) else container))
    return [n for n, m in first.named_modules() if isinstance(m, nn.Linear)]
