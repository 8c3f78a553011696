"""transformers' KV cache as flat tensors: which tensors a model caches, in and out of its cache object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CacheSlot:
    """One tensor of the cache. ``past_axis``: the axis that grows with tokens, None for fixed-size state."""

    layer: int
    name: str
    attribute: str
    state: int | None
    shape: tuple[int, ...]
    past_axis: int | None
    dtype: torch.dtype

    @property
    def input_name(self) -> str:
        return f"past.{self.layer}.{self.name}"

    @property
    def output_name(self) -> str:
        return f"present.{self.layer}.{self.name}"

    @property
    def symbolic_shape(self) -> tuple[int | str, ...]:
        """Shape of the input: ``batch`` first, ``past`` where it grows."""
        return tuple(
            "batch" if axis == 0 else "past" if axis == self.past_axis else size
            for axis, size in enumerate(self.shape)
        )

    def read(self, cache: Any) -> torch.Tensor:
        """This slot's tensor in a cache object."""
        value = getattr(cache.layers[self.layer], self.attribute)
        tensor: torch.Tensor = value if self.state is None else value[self.state]
        return tensor


_PLAIN = (("key", "keys"), ("value", "values"), ("indexer_key", "indexer_keys"), ("idx_key", "idx_keys"))
_CONSTANTS = {"_sliding_window_tensor"}  # a layer keeps them, and they do not depend on the tokens
_STATES = (("conv", "conv_states"), ("recurrent", "recurrent_states"))


def _tensors(cache: Any) -> Iterator[tuple[int, str, str, int | None, torch.Tensor]]:
    import torch

    for index, layer in enumerate(cache.layers):
        _refuse_unknown(index, layer)
        for name, attribute in _PLAIN:
            value = getattr(layer, attribute, None)
            if isinstance(value, torch.Tensor) and value.numel():
                yield index, name, attribute, None, value
        for name, attribute in _STATES:
            for state, value in (getattr(layer, attribute, None) or {}).items():
                if isinstance(value, torch.Tensor):
                    yield index, name if state == 0 else f"{name}{state}", attribute, state, value


def _refuse_unknown(index: int, layer: Any) -> None:
    """A tensor that a layer keeps and we do not hand through would silently be lost between two runs."""
    import torch

    known = {attribute for _, attribute in (*_PLAIN, *_STATES)} | _CONSTANTS
    for attribute, value in vars(layer).items():
        held = value.values() if isinstance(value, dict) else value
        held = held if isinstance(held, Iterable) and not isinstance(held, torch.Tensor) else (held,)
        if attribute not in known and any(isinstance(v, torch.Tensor) and v.numel() for v in held):
            raise UnsupportedModelError(
                f"cache layer {index} ({type(layer).__name__}) keeps {attribute!r}, which is no known cache "
                "tensor; export with task feature-extraction instead"
            )


def new_cache(model: PreTrainedModel) -> Any:
    """An empty cache for ``model`` whose sliding layers keep every token (the mask applies the window).

    A cache cut to the window cannot be traced: the cut depends on the number of tokens seen, and the trace
    would bake the sample's number in.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = DynamicLayer()
    return cache


def plan_cache(model: PreTrainedModel, probe: dict[str, torch.Tensor]) -> tuple[CacheSlot, ...]:
    """Run ``model`` on several lengths and see which tensors it caches and how they grow.

    Args:
        probe: ``input_ids`` and ``attention_mask`` [batch, sequence], batch of 2, sequence of at least 4.

    Raises:
        UnsupportedModelError: something is cached that neither grows by one per token nor has a fixed size.
    """
    import torch

    def run(length: int) -> list[tuple[int, str, str, int | None, torch.Tensor]]:
        cache = new_cache(model)
        with torch.no_grad():
            model(
                input_ids=probe["input_ids"][:, :length],
                attention_mask=probe["attention_mask"][:, :length],
                past_key_values=cache,
                use_cache=True,
            )
        return list(_tensors(cache))

    length = probe["input_ids"].shape[1]
    # One token less shows what grows; two tokens, what grows only now and then or is cut to a few.
    lengths = (length, length - 1, 2)
    runs = [run(n) for n in lengths]
    if len({tuple(t[:4] for t in tensors) for tensors in runs}) != 1:
        raise UnsupportedModelError(
            "the model's cache holds different tensors for different lengths; "
            "export with task feature-extraction instead"
        )
    slots = []
    for kept in zip(*runs, strict=True):
        layer, name, attribute, state, long = kept[0]
        shapes = [tuple(tensor.shape) for *_, tensor in kept]
        growing = [a for a in range(long.dim()) if len({shape[a] for shape in shapes}) > 1]
        every_token = [tuple(n if a in growing else d for a, d in enumerate(shapes[0])) for n in lengths]
        if len(growing) > 1 or shapes != every_token:
            raise UnsupportedModelError(
                f"cache tensor {name} of layer {layer} is {shapes[0]} after {lengths[0]} tokens, {shapes[1]} "
                "after "
                f"{lengths[1]} and {shapes[2]} after {lengths[2]}; only caches that keep every token, or "
                "state of "
                "fixed size, can be flat inputs"
            )
        slots.append(
            CacheSlot(
                layer, name, attribute, state, tuple(long.shape), growing[0] if growing else None, long.dtype
            )
        )
    return tuple(slots)


def fill_cache(model: PreTrainedModel, slots: Sequence[CacheSlot], tensors: Sequence[torch.Tensor]) -> Any:
    """A cache object that holds ``tensors`` (one per slot) as its past."""
    cache = new_cache(model)
    for slot, tensor in zip(slots, tensors, strict=True):
        layer = cache.layers[slot.layer]
        layer.dtype, layer.device = tensor.dtype, tensor.device
        if slot.state is None:
            setattr(layer, slot.attribute, tensor)
            layer.is_initialized = True
            if slot.attribute == "indexer_keys":
                layer.is_indexer_initialized = True
        else:
            getattr(layer, slot.attribute)[slot.state] = tensor.clone()
            flags = (
                "is_conv_states_initialized"
                if slot.attribute == "conv_states"
                else "is_recurrent_states_initialized"
            )
            getattr(layer, flags)[slot.state] = True
            layer.has_previous_state[slot.state] = True
            if slot.attribute == "conv_states":
                layer.conv_kernel_size[slot.state] = tensor.shape[-1]
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None and layer.values is None:
            layer.values = layer.keys[..., :0]  # a family without positional keys caches a zero-width tensor
    return cache
