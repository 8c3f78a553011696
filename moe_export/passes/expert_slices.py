"""Some experts of a weight stack [E, ...], without reading the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

        from ..graph.expert_stacks import stack_of

        key = id(stack), tuple(experts)
        if key not in self._made:
            assert stack.const_value is not None
            tensor = stack_of(stack.const_value).take(key[1], f"{stack.name}.own{len(self._made)}")
            value = ir.Value(name=tensor.name, const_value=tensor, type=stack.type, shape=tensor.shape)
            self._graph.register_initializer(value)
            self._made[key] = value
        return self._made[key]

    def remove_unused(self) -> None:
        """Forget the stacks that nothing reads any more."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
