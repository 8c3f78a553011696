"""The instrumented model: forcing must reach the experts, or be refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from moe_export.backends.onnxruntime.runner import create_session
from moe_export.errors import BundleError
from moe_export.runtime.instrument import layer_traces, traced_model
from moe_export.runtime.session import Session
from moe_export.schema import MoELayer
from tests.helpers.tiny_bundle import TinyWeights, build_tiny_model


@pytest.fixture
def layers(tiny: Session) -> tuple[MoELayer, ...]:
    return tiny.manifest.moe_layers


def _saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _consumers(model: onnx.ModelProto, name: str) -> list[tuple[onnx.NodeProto, int]]:
    return [(node, i) for node in model.graph.node for i, used in enumerate(node.input) if used == name]


def test_outputs_are_added_once_and_routers_pruned(tiny_path: Path, layers: tuple[MoELayer, ...]) -> None:
    shown = create_session(
        traced_model(tiny_path / "model.onnx", layers, force_routing=False), folder=tiny_path
    )
    names = [value.name for value in shown.get_outputs()]
    assert len(names) == len(set(names)) == 5 + 2 * 5
    forced = create_session(
        traced_model(tiny_path / "model.onnx", layers, force_routing=True), folder=tiny_path
    )
    inputs = {value.name: value.type for value in forced.get_inputs()}
    assert inputs["moe.0.expert_ids"] == "tensor(int32)" and inputs["moe.1.weights"] == "tensor(float)"
    assert not {"moe.0.expert_ids", "moe.1.weights"} & {value.name for value in forced.get_outputs()}


@pytest.mark.parametrize("value", ["expert_ids", "weights"])
def test_a_detached_value_is_refused(tmp_path: Path, layers: tuple[MoELayer, ...], value: str) -> None:
    model = build_tiny_model(TinyWeights.make())
    name = f"moe.1.{value}"
    for node, i in _consumers(model, name):
        node.input[i] = f"{name}.inner"
    producer = next(node for node in model.graph.node if name in node.output)
    producer.output[0] = f"{name}.inner"
    model.graph.node.append(helper.make_node("Identity", [f"{name}.inner"], [name]))
    path = _saved(tmp_path, model)
    assert traced_model(path, layers, force_routing=False)
    with pytest.raises(BundleError, match=f"layer 1 .* does not compute its output from '{name}'"):
        traced_model(path, layers, force_routing=True)


def test_logits_used_beside_the_routing_are_refused(tmp_path: Path, layers: tuple[MoELayer, ...]) -> None:
    model = build_tiny_model(TinyWeights.make())
    node = next(node for node in model.graph.node if "moe.0.output" in node.output)
    node.output[0] = "moe.0.output.inner"
    gate = helper.make_node("ReduceMax", ["moe.0.logits"], ["gate"], keepdims=1, axes=[-1])
    model.opset_import[0].version = 17
    model.graph.node.extend([gate, helper.make_node("Mul", ["moe.0.output.inner", "gate"], ["moe.0.output"])])
    with pytest.raises(BundleError, match="computes its output from 'moe.0.logits' beside its routing"):
        traced_model(_saved(tmp_path, model), layers, force_routing=True)


def test_routing_read_inside_a_subgraph_counts(tmp_path: Path, layers: tuple[MoELayer, ...]) -> None:
    """The experts' computation may lie in an If or Loop body that reads the routing from outside."""
    model = build_tiny_model(TinyWeights.make())
    graph = model.graph
    for name, kind in (("moe.0.weights", TensorProto.FLOAT), ("moe.0.expert_ids", TensorProto.INT32)):
        inner = f"{name}.seen"
        for node, i in _consumers(model, name):
            node.input[i] = inner
        branches = [
            helper.make_graph(
                [helper.make_node("Identity", [name], [f"{inner}.{b}"])],
                b,
                [],
                [helper.make_tensor_value_info(f"{inner}.{b}", kind, None)],
            )
            for b in ("then_branch", "else_branch")
        ]
        place = next(i for i, node in enumerate(graph.node) if name in node.output) + 1
        choice = helper.make_node(
            "If", ["yes"], [inner], then_branch=branches[0], else_branch=branches[1], name=inner
        )
        graph.node.insert(place, choice)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    session = create_session(traced_model(_saved(tmp_path, model), layers, force_routing=True))
    assert {"moe.0.weights", "moe.0.expert_ids"} <= {value.name for value in session.get_inputs()}


def test_traces_must_have_the_declared_shape(layers: tuple[MoELayer, ...], tiny: Session) -> None:
    trace = tiny.run_traced({"input_ids": [[1, 2, 3]]}).layers[0]
    layer = layers[0]
    outputs = {
        layer.expert_ids: trace.expert_ids,
        layer.weights: trace.weights,
        layer.hidden: trace.hidden,
        layer.output: trace.output,
        str(layer.logits): np.asarray(trace.logits),
    }
    assert layer_traces([layer], outputs)[0].weights.shape == (3, 2)
    with pytest.raises(BundleError, match="'moe.0.weights' has shape"):
        layer_traces([layer], {**outputs, layer.weights: trace.weights[:2]})
    with pytest.raises(BundleError, match="'moe.0.expert_ids' has dtype float32"):
        layer_traces([layer], {**outputs, layer.expert_ids: trace.weights})
    with pytest.raises(BundleError, match="'moe.0.hidden' has shape"):
        layer_traces([dataclasses.replace(layer, hidden_size=7)], outputs)
    half = layer_traces([layer], {**outputs, layer.weights: trace.weights.astype(np.float16)})[0]
    assert half.weights.dtype == np.float32
