"""Stacks of experts: what is written is what the numbers say, and one matrix at a time is held."""

from __future__ import annotations

import io
import tracemalloc

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from moe_export.graph.expert_stacks import ExpertStack, stack_of


def numbers(experts: int = 5) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((experts, 3, 4)).astype(np.float32)


def written(tensor: ir.TensorProtocol) -> bytes:
    stream = io.BytesIO()
    tensor.tofile(stream)
    return stream.getvalue()


def test_a_stack_reads_as_the_tensor_that_it_is_of() -> None:
    array = numbers()
    stack = stack_of(ir.tensor(array, name="w"))
    assert stack_of(stack) is stack
    assert np.array_equal(stack.numpy(), array)
    assert np.array_equal(stack.expert(3), array[3])
    assert written(stack) == stack.tobytes() == array.tobytes()
    assert stack.nbytes == array.nbytes and stack.name == "w"


def test_changed_and_chosen_experts() -> None:
    array = numbers()
    stack = stack_of(ir.tensor(array, name="w"))
    turned = stack.each(lambda m: m.T, (4, 3), "turned")
    taken = turned.take([4, 0, 4], "rank1")
    wanted = np.ascontiguousarray(array.swapaxes(1, 2)[[4, 0, 4]])
    assert taken.shape.numpy() == (3, 4, 3) and taken.name == "rank1"
    assert written(taken) == wanted.tobytes()
    rounded = taken.each(lambda m: m.astype(ml_dtypes.bfloat16), (4, 3), "b", ir.DataType.BFLOAT16)
    assert written(rounded) == wanted.astype(ml_dtypes.bfloat16).tobytes() == rounded.tobytes()
    with pytest.raises(IndexError, match="w has 5 experts, and expert 5 was taken"):
        stack.take([0, 5], "none")


def test_a_matrix_of_another_form_is_refused() -> None:
    stack = stack_of(ir.tensor(numbers(), name="w"))
    for wrong in (lambda m: m[:2], lambda m: m.astype(np.float64)):
        made = stack.each(wrong, (3, 4), "wrong")
        for read in (made.numpy, lambda made=made: made.expert(1), lambda made=made: written(made)):
            with pytest.raises(ValueError, match="expert . of wrong was made float"):
                read()


def test_a_computed_tensor_is_computed_once_per_reading() -> None:
    calls = []

    def compute() -> ir.TensorProtocol:
        calls.append(1)
        return ir.tensor(numbers())

    lazy = ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape((5, 3, 4)), name="w")
    written(stack_of(lazy).each(lambda m: 2 * m, (3, 4), "double").take([1, 2, 3], "some"))
    assert len(calls) == 1


def test_writing_holds_one_matrix() -> None:
    def opened() -> ...:
        return lambda index: np.full((256, 1024), index, np.float32)  # 1 MiB each

    class Nowhere(io.RawIOBase):
        def write(self, data: object) -> int:
            return memoryview(data).nbytes  # type: ignore[arg-type]

    stack = ExpertStack(opened, ir.DataType.FLOAT, (64, 256, 1024), "w")
    tracemalloc.start()
    stack.each(lambda m: m + 1, (256, 1024), "more").tofile(Nowhere())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
