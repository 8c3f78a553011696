"""Finds the mixture-of-experts layers of a torch module by structure, without running it.

Routed experts are one of

* a module with an expert count (``num_experts``) and weights whose first dimension it is (transformers'
  experts classes: 3-D ``gate_up_proj`` and ``down_proj``), or embedding tables with one row per expert,
* what a registered adapter (``register_moe_block``) says they are,
* a list of alike modules, one per expert, under a name with "expert" in it,
* a module under such a name with an expert count and weights that split evenly (all experts in one matrix).

"shared" in the name means experts that every token uses: those are ordinary parameters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_COUNT = ("num_experts", "num_routed_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
_CHOICES = ("total_experts",)
_TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k",
          "moe_k", "experts_per_token", "num_selected_experts", "k")  # fmt: skip
_HIDDEN = ("hidden_dim", "hidden_size", "input_size", "d_model")
_INTERMEDIATE = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_hidden_size", "ffn_dim", "d_ff")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_ROUTER = ("norm_topk_prob", "num_group", "n_group", "topk_group", "routed_scaling_factor", "scoring_func",
           "score_function", "expert_capacity", "moe_capacity_factor")  # fmt: skip


@dataclass(frozen=True)
class ExpertBlock:
    """The routed experts of one MoE layer.

    ``parameters`` counts all of theirs. ``choices`` is the number of things a router chooses from; it is
    larger than ``num_experts`` where some of them have no weights (identity experts). ``top_k`` is None
    where no attribute and no configuration value tells it.
    """

    name: str
    num_experts: int
    choices: int
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    shared_experts: int
    parameters: int
    usable_parameters: int
    """``parameters`` without rows of a weight that belong to no expert with weights."""
    routing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    name: str
    module: torch.nn.Module
    count: int
    top_k: int | None = None
    is_block: bool = False
    """Whether the name is the block's own, whatever it is called."""

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2].lower()

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def find_expert_blocks(model: torch.nn.Module, config: Any = None) -> tuple[ExpertBlock, ...]:
    """Every block of routed experts in ``model``, in the order of its modules.

    ``config`` (a transformers configuration) is asked for what the modules do not say. Parameters may be on
    the meta device.
    """
    found: list[_Found] = []
    for name, module in model.named_modules():
        if not any(f"{name}.".startswith(f"{above.name}.") for above in found):
            found += _experts_at(name, module)
    groups: dict[str, list[_Found]] = {}
    for part in found:
        # A layer may keep its experts' matrices in several modules: one block, called as their parent.
        own = part.is_block or "expert" in part.last
        groups.setdefault(part.name if own else part.parent, []).append(part)
    counted: set[int] = set()
    return tuple(_describe(model, name, parts, config, counted) for name, parts in groups.items())


def _experts_at(name: str, module: torch.nn.Module) -> list[_Found]:
    import torch

    from moe_export.models.adapters import spec_of

    if (spec := spec_of(module)) is not None:
        path = f"{name}.{spec.experts}" if name else spec.experts
        top_k = getattr(module, spec.top_k, None) if isinstance(spec.top_k, str) else spec.top_k
        experts = spec.expert_list(module)
        return [_Found(path, module.get_submodule(spec.experts), len(experts), top_k, is_block=True)]
    last = name.rpartition(".")[2].lower()
    if any(word in last for word in ("shared", "router", "gate")):
        return []
    count = _int_attribute(module, _COUNT)
    if count is not None and count > 1:
        own = list(module.parameters(recurse=False))
        if any(p.ndim == 3 and p.shape[0] in (count, _choices(module, count)) for p in own):
            return [_Found(name, module, count)]
        tables = [
            _Found(f"{name}.{child_name}", child, count)
            for child_name, child in module.named_children()
            if isinstance(child, torch.nn.Embedding) and child.num_embeddings == count
        ]
        if tables:
            return tables
    if "expert" not in last:
        return []
    children = list(module.children())
    if len(children) > 1 and len({_shapes(child) for child in children}) == 1 and _shapes(children[0]):
        return [_Found(name, module, len(children))]
    total = sum(p.numel() for p in module.parameters())
    if count is not None and count > 1 and total and total % count == 0:
        return [_Found(name, module, count)]
    return []


def _shapes(module: torch.nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _choices(module: torch.nn.Module, count: int) -> int:
    return _int_attribute(module, _CHOICES) or count


def _describe(
    model: torch.nn.Module, name: str, parts: list[_Found], config: Any, counted: set[int]
) -> ExpertBlock:
    """``counted``: ids of parameters of earlier blocks; layers that share experts count them once."""
    first = parts[0]
    parent = model.get_submodule(first.parent)
    experts = {id(part.module) for part in parts}
    routers = [child for child in parent.children() if id(child) not in experts and _is_router(child)]
    configs = [getattr(thing, "config", None) for thing in (parent, *routers)]
    configs += [config, getattr(config, "text_config", None)]
    configs = [c for c in configs if c is not None]
    choices = _choices(first.module, first.count)
    parameters = [p for part in parts for p in part.module.parameters() if id(p) not in counted]
    counted.update(id(p) for p in parameters)
    hidden, intermediate = _sizes(parts, parent)
    return ExpertBlock(
        name=name,
        num_experts=first.count,
        choices=choices,
        top_k=first.top_k or _top_k(first.module, parent, routers, configs),
        hidden_size=hidden,
        intermediate_size=intermediate,
        shared_experts=_shared_experts(parent, configs),
        parameters=sum(p.numel() for p in parameters),
        usable_parameters=sum(
            p.numel() * first.count // choices if p.shape[0] == choices else p.numel() for p in parameters
        ),
        routing=_routing(parent, routers),
    )


def _sizes(parts: list[_Found], parent: torch.nn.Module) -> tuple[int | None, int | None]:
    """Hidden and intermediate size: from the weights' shapes where they tell, else from attributes."""
    import torch

    experts = parts[0].module
    if isinstance(experts, torch.nn.Embedding):  # an expert is one pair of vectors
        return experts.embedding_dim, 1
    hidden, intermediate = _int_attribute(experts, _HIDDEN), _int_attribute(experts, _INTERMEDIATE)
    down = getattr(experts, "down_proj", None)
    if isinstance(down, torch.Tensor) and down.ndim == 3:
        rows, columns = down.shape[1:]
        if intermediate is None or intermediate not in (rows, columns):
            intermediate = rows if getattr(experts, "is_transposed", False) else columns
        return (columns if intermediate == rows else rows), intermediate
    linear = next((m for m in experts.modules() if isinstance(m, torch.nn.Linear)), None)
    if linear is not None:
        return linear.in_features, linear.out_features
    if len(parts) > 1:  # one module per matrix: the last one maps back to the hidden size
        return hidden, _int_attribute(parts[-1].module, _HIDDEN)
    return hidden, intermediate or _int_attribute(parent, _INTERMEDIATE)


def _is_router(module: torch.nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "rout" in name or "gat" in name or _int_attribute(module, _TOP_K) is not None


def _top_k(
    experts: torch.nn.Module, parent: torch.nn.Module, routers: list[torch.nn.Module], configs: list[Any]
) -> int | None:
    for module in (*routers, parent, experts):
        if (found := _int_attribute(module, _TOP_K)) is not None:
            return found
    for module in routers:
        if match := re.search(r"Top(\d+)Router", type(module).__name__):
            return int(match.group(1))
    return next((k for k in (_int_attribute(c, _TOP_K[:-1]) for c in configs) if k is not None), None)


def _shared_experts(parent: torch.nn.Module, configs: list[Any]) -> int:
    shared = [name for name, _ in parent.named_children() if "shared" in name and "gate" not in name]
    if not shared:
        return 0
    counts = (_int_attribute(thing, _SHARED) for thing in (parent, *configs))
    return next((c for c in counts if c), 1)


def _routing(parent: torch.nn.Module, routers: list[torch.nn.Module]) -> dict[str, Any]:
    values: dict[str, Any] = {"router": type(routers[0]).__name__} if routers else {}
    for module in (parent, *routers):
        for name in _ROUTER:
            value = vars(module).get(name)
            if isinstance(value, (bool, int, float, str)):
                values[name] = value
    return values


def _int_attribute(thing: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(thing, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
