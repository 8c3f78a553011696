"""Tracing refuses everything that would fix the sample's sizes in the graph, and names input and axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from moe_export.errors import ExportError, UsageError
from moe_export.importer import graphs
from moe_export.importer.graphs import TracedGraph
from moe_export.importer.trace import OPSETS, check_opset, trace
from moe_export.schema import ModelIO, TensorSpec

torch.set_num_threads(1)
SIZES = (3, 5, 4)


class Small(nn.Module):
    """A linear layer, then any function of its result."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)

    def forward(self, frames: Tensor) -> Any:
        return self.function(self.linear(frames))


def plan(function: Callable[[Tensor], Any], sizes: tuple[int, ...] = SIZES) -> TracedGraph:
    return graphs.module_graph(
        Small(function).eval(), {"frames": torch.randn(sizes)}, {"frames": {0: "batch", 1: "sequence"}}
    )


def run(model: ir.Model, *shape: int) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"frames": np.ones(shape, np.float32)}))


FROZEN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a size read as a number": (
        lambda x: x * int(x.shape[1]),
        r"frames, axis 1 \('sequence'\) was frozen to the sample's size 5",
    ),
    "a loop over a size": (
        lambda x: sum(x[:, i] for i in range(int(x.shape[1]))),
        r"axis 1 \('sequence'\) was frozen .* size 5",
    ),
    "a branch on a size": (
        lambda x: x if x.shape[1] < 8 else x * 2,
        r"frames, axis 1 \('sequence'\) cannot stay dynamic.*hold only where 2 <= size and size <= 7\.",
    ),
    "a branch the other way": (
        lambda x: x if x.shape[1] > 3 else x * 2,
        r"axis 1 \('sequence'\) .*only where 4 <= size\.",
    ),
    "the last eight": (lambda x: x[:, -8:], r"axis 1 \('sequence'\) cannot stay dynamic"),
    "a view of fixed size": (lambda x: x.view(15, 4), r"frames, axis 0 \('batch'\) cannot stay dynamic"),
    "a size that is checked": (
        lambda x: (torch._check(x.shape[1] <= 8), x)[1],
        r"axis 1 \('sequence'\) .*size <= 8",
    ),
    "one token is special": (
        lambda x: x * 2 if x.shape[1] == 1 else x,
        "at batch 1, sequence 1 the traced graph gives another output",
    ),
    "one row is special": (
        lambda x: x[:1] if x.shape[0] == 1 else x + 1,
        "at batch 1, sequence 1 the traced graph gives another output",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_the_sample_fixes_is_refused(name: str) -> None:
    function, message = FROZEN[name]
    with pytest.raises(ExportError, match=message) as refused:
        trace(plan(function), 20)
    assert "rewrite it with tensor operations" in str(refused.value)


def test_a_size_stays_dynamic() -> None:
    model, io = trace(plan(lambda x: x * x.shape[1] + x.mean(dim=1, keepdim=True)), 20)
    assert io.outputs == (TensorSpec("output", "float32", ("batch", "sequence", 4)),)
    assert run(model, 1, 1, 4)[0].shape == (1, 1, 4)
    assert run(model, 2, 9, 4)[0].shape == (2, 9, 4)


@pytest.mark.slow
def test_equal_sample_sizes_do_not_tie_dimensions() -> None:
    model, _ = trace(plan(lambda x: x + 1, sizes=(5, 5, 4)), 20)
    assert run(model, 2, 3, 4)[0].shape == (2, 3, 4)


def test_dimensions_that_must_be_equal_are_refused() -> None:
    with pytest.raises(ExportError, match=r"frames, axis [01] \('(batch|sequence)'\)"):
        trace(plan(lambda x: x + x.transpose(0, 1), sizes=(5, 5, 4)), 20)


class Steps(nn.Module):
    """Like a decoder: new rows, a mask over all, past rows. ``tie``: the mask is as long as both."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], tie: bool) -> None:
        super().__init__()
        self.function = function
        self.tie = tie

    def forward(self, *tensors: Tensor) -> Tensor:
        x, mask, past = tensors
        if self.tie:
            torch._check(mask.shape[1] == past.shape[1] + x.shape[1])
        return self.function(x, mask, past)


def steps(function: Callable[[Tensor, Tensor, Tensor], Tensor], tie: bool) -> TracedGraph:
    io = ModelIO(
        (
            TensorSpec("x", "float32", ("batch", "sequence", 4)),
            TensorSpec("mask", "int64", ("batch", "total"), "mask"),
            TensorSpec("past", "float32", ("batch", "past", 4)),
        ),
        (TensorSpec("y", "float32", ("?",) * 3),),
    )
    sample = (torch.randn(3, 5, 4), torch.ones(3, 16, dtype=torch.int64), torch.randn(3, 11, 4))
    return TracedGraph(Steps(function, tie), sample, io)


def joined(x: Tensor, _mask: Tensor, past: Tensor) -> Tensor:
    return torch.cat([past, x], dim=1)


def test_total_is_past_and_sequence() -> None:
    _, io = trace(steps(lambda x, m, p: joined(x, m, p) * m[:, :, None], tie=True), 20)
    assert io.outputs[0].shape == ("batch", "total", 4)


@pytest.mark.parametrize(
    ("function", "tie", "message"),
    [
        (
            lambda x, m, p: joined(x, m, p) * int(m.shape[1]),
            False,
            r"mask, axis 1 \('total'\) was frozen to the sample's size 16",
        ),
        (
            lambda x, m, p: joined(x, m, p) * int(m.shape[1]),
            True,
            "the model's code reads this size as a number",
        ),
        (
            lambda x, m, p: x if m.shape[1] < 20 else x * 2,
            False,
            r"mask, axis 1 \('total'\) cannot be more than 19 in the traced graph",
        ),
        (
            lambda x, m, p: x if m.shape[1] < 20 else x * 2,
            True,
            r"past, axis 1 \('past'\) and x, axis 1 \('sequence'\) cannot stay dynamic",
        ),
    ],
    ids=["number", "number of a sum", "branch", "branch on a sum"],
)
def test_the_sum_of_two_dimensions_is_watched_too(function: Any, tie: bool, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        trace(steps(function, tie), 20)


def test_values_of_tensors_decide_nothing() -> None:
    for function in (lambda x: x if x.sum() > 0 else -x, lambda x: x * float(x.sum().item())):
        with pytest.raises(ExportError, match="its code decides by the values of a tensor") as refused:
            trace(plan(function), 20)
        assert "docs/own-modules.md" in str(refused.value)


def test_a_failed_trace_prints_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError):
        trace(plan(lambda x: x if x.sum() > 0 else -x), 20)
    captured = capfd.readouterr()
    assert "def forward" not in captured.err + captured.out


def test_code_that_fails_only_while_tracing_is_named() -> None:
    def traced_only(x: Tensor) -> Tensor:
        if isinstance(x, torch._subclasses.FakeTensor) or torch.compiler.is_exporting():
            raise KeyError("only here")
        return x

    with pytest.raises(
        ExportError, match="Small: torch.export cannot trace the model: KeyError: 'only here'"
    ):
        trace(plan(traced_only), 20)


def test_small_constants_stay() -> None:
    model, _ = trace(plan(lambda x: torch.log(x.clamp(min=0) * 0 + 1e-9) * 1.000004 + 0.0), 20)
    (got,) = run(model, 1, 2, 4)
    assert np.allclose(got, np.log(1e-9) * 1.000004, rtol=1e-6)
    assert "Add" in {n.op_type for n in model.graph}


@pytest.mark.parametrize("opset", OPSETS)
def test_opsets(opset: int) -> None:
    check_opset(opset)


def test_the_opset_is_in_the_file() -> None:
    model, _ = trace(plan(lambda x: x.softmax(-1)), 24)
    assert model.graph.opset_imports[""] == 24
    run(model, 2, 2, 4)


@pytest.mark.parametrize("opset", [17, 19, 23, 25])
def test_other_opsets_are_refused(opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} is not supported.*choose one of 20, 21, 22, 24"):
        trace(plan(lambda x: x), opset)


def test_opset_23_says_why() -> None:
    with pytest.raises(ExportError, match="RotaryEmbedding gives wrong results in ONNX Runtime"):
        check_opset(23)


class Named(nn.Module):
    """Inputs and outputs whose names the exporter likes to give to other values."""

    def forward(self, linear: Tensor, mul: Tensor) -> dict[str, Tensor]:
        add = linear + mul
        return {"add": add * 2, "val_0": add, "linear_1": linear}


def test_inputs_and_outputs_keep_their_names_whatever_the_exporter_calls_its_own() -> None:
    inputs = {"linear": torch.randn(2, 3), "mul": torch.randn(2, 3)}
    traced = graphs.module_graph(Named().eval(), inputs, {n: {0: "batch"} for n in inputs})
    model, io = trace(traced, 20)
    assert [v.name for v in model.graph.inputs] == ["linear", "mul"]
    assert (
        [v.name for v in model.graph.outputs] == ["add", "val_0", "linear_1"] == [s.name for s in io.outputs]
    )
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    one, two = np.ones((4, 3), np.float32), np.full((4, 3), 2, np.float32)
    doubled, summed, same = session.run(None, {"linear": one, "mul": two})
    assert (doubled == 6).all() and (summed == 3).all() and (same == 1).all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: None, "returns nothing; expected a tensor, or a tuple or dict of tensors"),
        (lambda x: (x, 3), "output_1 is int; expected a tensor"),
        (lambda x: (x, (x, x)), "output_1 is tuple; expected a tensor"),
        (lambda x: {"frames": x}, "output 'frames' has the name of an input"),
        (lambda x: {"": x}, "an output has an empty name"),
        (
            lambda x: 1 / 0,
            r"fails on its sample inputs \(frames; its forward takes frames\): ZeroDivisionError",
        ),
    ],
)
def test_outputs_that_are_no_tensors_are_refused(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(function)


def test_wrong_input_names_are_named() -> None:
    with pytest.raises(UsageError, match=r"fails on its sample inputs \(images; its forward takes frames\)"):
        graphs.module_graph(Small(lambda x: x), {"images": torch.randn(SIZES)}, {})


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: (x, x + 1), ["output_0", "output_1"]),
        (lambda x: [x, x], ["output_0", "output_1"]),
        (lambda x: {"a": x, "b": x.sum()}, ["a", "b"]),
    ],
)
def test_outputs_are_named(function: Callable[[Tensor], Any], names: list[str]) -> None:
    assert [s.name for s in plan(function).io.outputs] == names
