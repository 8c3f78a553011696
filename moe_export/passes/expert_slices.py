"""Some experts of a weight stack [E, ...], without reading the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..graph.expert_tensors import EXPERT_TENSORS

if TYPE_CHECKING:
    import onnx_ir as ir


class ExpertSlices:
    """Slices of one graph's stacks; a stack that two layers share is sliced once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[int, tuple[int, ...]], ir.Value] = {}

    def take(self, stack: ir.Value, experts: Sequence[int]) -> ir.Value:
        """An initializer with ``experts`` of the initializer ``stack``, in their order."""
        import onnx_ir as ir

        key = id(stack), tuple(experts)
        if key not in self._made:
            assert stack.const_value is not None
            tensor = _sliced(stack.const_value, key[1], f"{stack.name}.own{len(self._made)}")
            value = ir.Value(name=tensor.name, const_value=tensor, type=stack.type, shape=tensor.shape)
            self._graph.register_initializer(value)
            self._made[key] = value
        return self._made[key]

    def remove_unused(self) -> None:
        """Forget the stacks that nothing reads any more."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]


def _sliced(tensor: Any, experts: tuple[int, ...], name: str) -> Any:
    """A tensor that is read when it is needed. Of matrices that lie apart, only those asked for are."""
    import onnx_ir as ir

    shape = ir.Shape([len(experts), *tensor.shape[1:]])
    parts = tensor.meta.get(EXPERT_TENSORS)
    if parts is None:
        made = ir.LazyTensor(
            lambda: ir.tensor(_rows(tensor, experts), dtype=tensor.dtype),
            dtype=tensor.dtype,
            shape=shape,
            name=name,
        )
        return made
    chosen = tuple(tuple(part[e] for e in experts) for part in parts)
    made = ir.LazyTensor(
        lambda: ir.tensor(_stacked(chosen), dtype=tensor.dtype), dtype=tensor.dtype, shape=shape, name=name
    )
    made.meta[EXPERT_TENSORS] = chosen
    return made


def _rows(tensor: Any, experts: tuple[int, ...]) -> Any:
    array = tensor.numpy()
    first = experts[0]
    if experts == tuple(range(first, first + len(experts))):
        return array[first : first + len(experts)]
    return array[list(experts)]


def _stacked(parts: tuple[tuple[Any, ...], ...]) -> Any:
    import numpy as np

    return np.stack([np.concatenate([m.numpy() for m in expert]) for expert in zip(*parts, strict=True)])
