"""Stacks of expert matrices that are made one matrix at a time, when they are read.

A stack holds how its matrices are made, not their numbers: packing, rounding and dividing experts over ranks
describe a new stack, and writing it holds one matrix in memory, whatever the model's size. This module
imports onnx_ir, so it is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from numpy.typing import NDArray

Matrices = Callable[[int], "NDArray[Any]"]
"""Gives the matrix of an expert by its place in the stack."""


class ExpertStack(ir.LazyTensor):
    """A tensor [E, ...] as E arrays. ``open_``: called once per reading of the stack; its result gives each
    array, in the stack's dtype and shape without E."""

    def __init__(
        self, open_: Callable[[], Matrices], dtype: ir.DataType, shape: Sequence[int], name: str | None
    ) -> None:
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(shape), name=name)
        self._open = open_
        self._sizes = tuple(int(n) for n in shape)

    def expert(self, index: int) -> NDArray[Any]:
        """One expert's array, made now."""
        return self._checked(self._open()(index), index)

    def take(self, experts: Sequence[int], name: str) -> ExpertStack:
        """The stack of those experts, in that order; one may stand several times.

        Raises:
            IndexError: there is no such expert.
        """
        held = tuple(experts)
        for index in held:
            if not 0 <= index < self._sizes[0]:
                raise IndexError(f"{self.name} has {self._sizes[0]} experts, and expert {index} was taken")

        def opened() -> Matrices:
            inner = self._open()
            return lambda index: inner(held[index])

        return ExpertStack(opened, self.dtype, (len(held), *self._sizes[1:]), name)

    def each(
        self,
        change: Callable[[NDArray[Any]], NDArray[Any]],
        shape: Sequence[int],
        name: str,
        dtype: ir.DataType | None = None,
    ) -> ExpertStack:
        """The stack of what ``change`` makes of each array. ``shape``: of its result; ``dtype``: None = as
        here."""

        def opened() -> Matrices:
            inner = self._open()
            return lambda index: change(inner(index))

        return ExpertStack(opened, dtype or self.dtype, (self._sizes[0], *shape), name)

    def tofile(self, file: Any) -> None:
        """Write the stack to a binary file, one array after the other."""
        matrices = self._open()
        for index in range(self._sizes[0]):
            array = np.ascontiguousarray(self._checked(matrices(index), index))
            file.write(array.reshape(-1).view(np.uint8).data)

    def _whole(self) -> ir.TensorProtocol:
        out = np.empty(self._sizes, self.dtype.numpy())
        matrices = self._open()
        for index in range(self._sizes[0]):
            out[index] = self._checked(matrices(index), index)
        return ir.tensor(out, dtype=self.dtype, name=self.name)

    def _checked(self, array: NDArray[Any], index: int) -> NDArray[Any]:
        if array.shape != self._sizes[1:] or array.dtype != self.dtype.numpy():
            raise ValueError(
                f"expert {index} of {self.name} was made {array.dtype} {array.shape}, the stack holds "
                f"{self.dtype.name} {self._sizes[1:]}"
            )
        return array


def stack_of(tensor: ir.TensorProtocol) -> ExpertStack:
    """Any tensor [E, ...] as a stack; one that is one already, as it is.

    Of another tensor that is computed when it is read, each reading of the stack computes it once.
    """
    if isinstance(tensor, ExpertStack):
        return tensor
    return ExpertStack(lambda: tensor.numpy().__getitem__, tensor.dtype, tensor.shape.numpy(), tensor.name)
