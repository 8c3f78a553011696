"""export_model: arguments, MoE layers that the trace must reach, hooks that leave no trace in the user's
model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from moe_export.errors import ExportError, UsageError
from moe_export.importer.export import export_model
from moe_export.importer.sources import load_source

from ..models.blocks import GATED, HIDDEN, GatedMoE, frames, registered, seeded

torch.set_num_threads(1)
INPUTS = {"frames": frames()}
DYNAMIC = {"frames": {0: "batch", 1: "sequence"}}


@pytest.fixture(autouse=True)
def adapters() -> Iterator[None]:
    with registered((GatedMoE, GATED)):
        yield


class Two(nn.Module):
    """``through``: runs the second block, passes by it, or computes its experts around its forward."""

    def __init__(self, through: str) -> None:
        super().__init__()
        self.through = through
        self.first = GatedMoE()
        self.second = GatedMoE()

    def forward(self, frames: Tensor) -> Tensor:
        x = self.first(frames)
        if self.through == "forward":
            x = self.second(x)
        elif self.through == "again":
            x = self.first(x)
        elif self.through == "around":
            x = sum(expert(x) for expert in self.second.experts)
        return x


def export(module: nn.Module, **options: Any) -> Any:
    return export_model(module, **{"inputs": INPUTS, "dynamic": DYNAMIC, **options})


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "through", ["around", pytest.param("nowhere", marks=SLOW), pytest.param("again", marks=SLOW)]
)
def test_a_layer_that_the_trace_does_not_reach_is_named(through: str) -> None:
    with pytest.raises(ExportError, match="1 of the 2 MoE layers are not in the traced graph: second;"):
        export(seeded(Two, through))


def run(model: ir.Model, feeds: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def test_the_users_model_is_as_it_was() -> None:
    model = seeded(Two, "forward")
    state = copy.deepcopy(model.state_dict())
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    exported = export(model)
    assert [layer.name for layer in exported.moe_layers] == ["first", "second"]
    assert exported.source.module is model
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    x = frames(2, 9, seed=3)
    with torch.no_grad():
        want = model(x).numpy()
    assert np.allclose(run(exported.model, {"frames": x.numpy()})[0], want, atol=1e-5)
    assert all(not n.metadata_props and n.doc_string is None for n in exported.model.graph)
    assert exported.model.producer_name == "moe-export"


def test_the_users_model_is_as_it_was_after_a_failure() -> None:
    model = seeded(Two, "nowhere")
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    names = sorted(model.state_dict())
    with pytest.raises(ExportError):
        export(model)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert sorted(model.state_dict()) == names
    with torch.no_grad():
        assert model(frames()).shape == frames().shape


@SLOW
def test_float16() -> None:
    model = seeded(Two, "forward")
    exported = export(model, dtype="float16")
    assert exported.dtype == "float16"
    assert {s.dtype for s in (*exported.io.inputs, *exported.io.outputs)} == {"float16"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x = frames(2, 4, seed=5)
    with torch.no_grad():
        want = model(x).numpy()
    (got,) = run(exported.model, {"frames": x.numpy().astype(np.float16)})
    assert got.dtype == np.float16 and np.abs(got - want).max() < 5e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "unknown dtype 'fp16'; .*choices: bfloat16, float16, float32"),
        ({"opset": 23}, "opset 23 is not supported"),
        ({"opset": 17}, "opset 17 is not supported"),
        ({"task": "text-generation"}, "needs a transformers model"),
        ({"inputs": None}, "needs sample inputs"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, ExportError), match=message):
        export(seeded(Two, "forward"), **options)


def test_a_spec_that_is_wrong_is_refused_before_tracing() -> None:
    import dataclasses

    with (
        registered((GatedMoE, dataclasses.replace(GATED, activation="relu"))),
        pytest.raises(
            UsageError, match="first .GatedMoE.: the block and its adapter compute different things"
        ),
    ):
        export(seeded(Two, "forward"))


def test_a_dense_module_exports_too() -> None:
    exported = export(
        seeded(nn.Linear, HIDDEN, 3), inputs={"input": frames()}, dynamic={"input": {0: "batch"}}
    )
    assert exported.moe_layers == ()
    assert [s.shape for s in exported.io.outputs] == [("batch", 5, 3)]
    assert run(exported.model, {"input": frames(4).numpy()})[0].shape == (4, 5, 3)


def test_a_loaded_source_may_be_given() -> None:
    source = load_source(seeded(nn.Linear, HIDDEN, 3), inputs={"input": frames()}, dynamic={})
    assert export_model(source).source is source
