"""Which layers of a model compute the same thing, so that one of each kind needs to be traced."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Path and list of the layers that the model's text config counts; None when that is not clear."""
    from torch import nn

    config = getattr(model, "config", None)
    if config is None:
        return None
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers" and len(module) == count
    ]
    return found[0] if len(found) == 1 and count else None


@dataclass(frozen=True)
class LayerKinds:
    """What a model computes, by texts that are equal where the same is computed on other weights.

    ``layers``: one for each layer. ``around``: what the model calls outside its layers.
    """

    layers: tuple[str, ...]
    around: str


def layer_kinds(model: nn.Module, layers: nn.ModuleList, run: Callable[[], Any]) -> LayerKinds:
    """Made of each layer's modules with their plain attributes, of the shapes of its weights, and of every
    operator that the model calls while ``run`` runs it, with all arguments that are no tensors: a layer that
    looks at its own number, or at the number of layers, shows there.
    """
    *calls, around = _operator_calls(model, list(layers), run)
    kinds = (_digest(f"{_description(layer)}\n{text}") for layer, text in zip(layers, calls, strict=True))
    return LayerKinds(tuple(kinds), _digest(around))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shortest_prefix(kinds: Sequence[str]) -> int | None:
    """How many layers hold each kind that occurs again two times after the first layer; None: all of them."""
    seen: dict[str, int] = {}
    for index, kind in enumerate(kinds):
        rest = kinds[index:]
        if all(seen.get(k, 0) >= 2 for k in set(rest)):
            return index
        if index:
            seen[kind] = seen.get(kind, 0) + 1
    return None


@contextmanager
def only_first_layers(model: nn.Module, path: str, count: int) -> Iterator[None]:
    """Inside, the model has its first ``count`` layers, and its configs say so."""
    from torch import nn

    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    whole = len(layers)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed: list[tuple[Any, str, Any]] = []
    for config in configs.values():
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == whole:
                changed.append((config, key, value))
                vars(config)[key] = value[:count]
            elif key == "num_hidden_layers" and value == whole:
                changed.append((config, key, value))
                vars(config)[key] = count
    setattr(parent, name, nn.ModuleList(list(layers)[:count]))
    try:
        yield
    finally:
        setattr(parent, name, layers)
        for config, key, value in changed:
            vars(config)[key] = value


_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes that hold a layer's own number. What it is used for shows in the operators called."""


def _description(layer: nn.Module) -> str:
    lines = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, float, str, tuple)) and key not in _NUMBERS and key[:1] != "_"
        }
        lines.append(f"{name} {type(module).__qualname__} {plain}")
    lines += [f"{name} {list(p.shape)} {p.dtype}" for name, p in layer.named_parameters()]
    lines += [f"{name} {list(b.shape)} {b.dtype}" for name, b in layer.named_buffers()]
    return "\n".join(lines)


def _operator_calls(model: nn.Module, layers: list[nn.Module], run: Callable[[], Any]) -> list[str]:
    """What each layer calls, one text per layer, and last what the model calls around them; weights of a
    layer by their name in it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[dict[int, str]] = [
        {id(t): n for n, t in (*layer.named_parameters(), *layer.named_buffers())} for layer in layers
    ]
    names.append({})
    logs: list[list[str]] = [[] for _ in names]
    inside: list[int] = []

    def shown(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            own = names[inside[-1]].get(id(value), "")
            return f"{own}{list(value.shape)}:{value.dtype}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(shown(v) for v in value)}]"
        return repr(value)

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if inside:
                given = [shown(a) for a in args] + [f"{k}={shown(v)}" for k, v in (kwargs or {}).items()]
                logs[inside[-1]].append(f"{func}({', '.join(given)})")
            return func(*args, **(kwargs or {}))

    def enter(index: int) -> Callable[..., None]:
        return lambda *_: inside.append(index)

    def leave(*_: Any) -> None:
        inside.pop()

    handles = []
    for index, layer in enumerate([*layers, model]):
        handles.append(layer.register_forward_pre_hook(enter(index)))
        handles.append(layer.register_forward_hook(leave))
    try:
        with torch.no_grad(), Log():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return ["\n".join(_without_attribute_names(log)) for log in logs]


def _without_attribute_names(log: list[str]) -> list[str]:
    """Our ops name their layer, which is another one in each."""
    import re

    return [re.sub(r"'[^']*\.\d+\.[^']*'", "'layer'", line) for line in log]
