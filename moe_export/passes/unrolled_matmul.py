"""One GroupedMatMul as plain nodes: split the rows by expert, multiply each part, concatenate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass
class Unroller:
    """Rewrites GroupedMatMul nodes of one graph; matrices and constants that several of them use are stored
    once."""

    graph: ir.Graph
    _matrices: dict[tuple[int, int, bool], ir.Value] = field(default_factory=dict)
    _constants: dict[int, ir.Value] = field(default_factory=dict)
    _sizes: dict[tuple[int, bool], ir.Value] = field(default_factory=dict)
    _tape: list[ir.Node] = field(default_factory=list)

    def unroll(self, node: ir.Node, *, drops: bool) -> None:
        """Replace ``node``, whose weight is a constant [E, ., .].

        A part of no rows costs one call that returns at once. With ``drops``, rows of no expert come first
        and last and become zeros.
        """
        import numpy as np
        import onnx_ir as ir

        rows, weight, offsets = node.inputs
        assert (
            rows is not None and weight is not None and offsets is not None and weight.const_value is not None
        )
        transposed = bool(node.attributes["transposed"].as_int())
        shape = weight.const_value.shape.numpy()
        experts, columns = shape[0], shape[2 if transposed else 1]
        zeros = np.zeros(1, weight.const_value.dtype.numpy())
        self._tape = []
        sizes = self._part_sizes(offsets, rows, drops)
        count = experts + (2 if drops else 0)
        parts = self._add("Split", [rows, sizes], outputs=count, axis=0) if count > 1 else [rows]
        products: list[ir.Value | None] = []
        for index, part in enumerate(parts):
            expert = index - 1 if drops else index
            if 0 <= expert < experts:
                (product,) = self._add("MatMul", [part, self._matrix(weight, expert, transposed)])
            else:
                (length,) = self._add("Shape", [part], start=0, end=1)
                (size,) = self._add("Concat", [length, self._constant(columns)], axis=0)
                (product,) = self._add("ConstantOfShape", [size], value=ir.tensor(zeros))
            product.type = rows.type
            products.append(product)
        joined = self._add("Concat", products, axis=0)[0] if len(products) > 1 else products[0]
        assert joined is not None
        old = node.outputs[0]
        joined.type, joined.shape = old.type, old.shape
        self.graph.insert_before(node, self._tape)
        name = old.name
        old.replace_all_uses_with(joined, replace_graph_outputs=True)
        old.name, joined.name = None, name
        self.graph.remove(node, safe=True)

    def _add(
        self, op: str, inputs: list[ir.Value | None], outputs: int = 1, **attributes: Any
    ) -> list[ir.Value]:
        import onnx_ir as ir

        made = ir.node(op, inputs, attributes=attributes, num_outputs=outputs)
        self._tape.append(made)
        return list(made.outputs)

    def _part_sizes(self, offsets: ir.Value, rows: ir.Value, drops: bool) -> ir.Value:
        """Rows per expert, with those before and after the experts' when ``drops``; shared by a layer's
        matmuls."""
        key = id(offsets), drops
        if key in self._sizes:
            return self._sizes[key]
        zero, one, minus_one, far = (self._constant(n) for n in (0, 1, -1, 2**62))
        (starts,) = self._add("Slice", [offsets, zero, minus_one, zero])
        (ends,) = self._add("Slice", [offsets, one, far, zero])
        (sizes,) = self._add("Sub", [ends, starts])
        if drops:
            (first,) = self._add("Slice", [offsets, zero, one, zero])
            (last,) = self._add("Slice", [offsets, minus_one, far, zero])
            (all_rows,) = self._add("Shape", [rows], start=0, end=1)
            (rest,) = self._add("Sub", [all_rows, last])
            (sizes,) = self._add("Concat", [first, sizes, rest], axis=0)
        self._sizes[key] = sizes
        return sizes

    def _matrix(self, weight: ir.Value, expert: int, transposed: bool) -> ir.Value:
        """The expert's matrix as [in, out], made when it is written."""
        import onnx_ir as ir

        from ..graph.expert_stacks import stack_of

        key = id(weight), expert, transposed
        if key not in self._matrices:
            assert weight.const_value is not None
            stack = stack_of(weight.const_value)
            _, a, b = stack.shape.numpy()
            made = ir.LazyTensor(
                lambda: ir.tensor(_laid_out(stack.expert(expert), transposed), dtype=stack.dtype),
                dtype=stack.dtype,
                shape=ir.Shape((a, b) if transposed else (b, a)),
            )
            self._matrices[key] = self._stored(f"{weight.name}.{expert}", made)
        return self._matrices[key]

    def _constant(self, number: int) -> ir.Value:
        import numpy as np
        import onnx_ir as ir

        if number not in self._constants:
            self._constants[number] = self._stored(
                f"moe.const.{number}", ir.tensor(np.asarray([number], np.int64))
            )
        return self._constants[number]

    def _stored(self, name: str, tensor: Any) -> ir.Value:
        """A new initializer; its name is ``name`` or, where that is taken, longer."""
        import onnx_ir as ir

        while name in self.graph.initializers:
            name += ".matrix"
        tensor.name = name
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape)
        )
        self.graph.register_initializer(value)
        return value


def _laid_out(matrix: Any, transposed: bool) -> Any:
    import numpy as np

    return np.ascontiguousarray(matrix if transposed else matrix.T)
