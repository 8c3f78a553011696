"""Tiny bundles whose model differs from the reference in more ways than
:data:`tests.helpers.tiny_bundle.BROKEN`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from moe_export.bundle.manifest import read_manifest
from moe_export.schema import Limits, Manifest, ModelIO, SourceInfo, TensorSpec
from moe_export.trace import TracedRun
from tests.helpers.tiny_bundle import build_tiny_model, make_tiny_bundle, write_manifest
from tests.helpers.tiny_model import TinyLayer, TinyWeights

Edit = Callable[[onnx.ModelProto], None]


def change_layer(weights: TinyWeights, index: int, **arrays: Any) -> TinyWeights:
    """``weights`` with some arrays of one layer replaced."""
    layers = list(weights.layers)
    layers[index] = dataclasses.replace(layers[index], **arrays)
    return dataclasses.replace(weights, layers=tuple(layers))


def scaled(array: np.ndarray, factor: float, *where: Any) -> np.ndarray:
    """``array`` with ``array[where]`` multiplied."""
    out = array.copy()
    out[where] *= np.float32(factor)
    return out


def bundle_of(
    folder: Path, weights: TinyWeights, broken: str | None = None, edit: Edit | None = None, **manifest: Any
) -> Path:
    """A bundle whose engine has these weights, in which ``edit`` may change the graph; manifest fields on
    top."""
    make_tiny_bundle(folder, tokenizer=manifest.pop("tokenizer", True))
    model = build_tiny_model(weights, broken)
    if edit is not None:
        edit(model)
    (folder / "model.onnx.data").unlink()
    onnx.save(
        model,
        str(folder / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    write_manifest(folder, dataclasses.replace(read_manifest(folder), **manifest))
    return folder


def bfloat16_weights(weights: TinyWeights) -> TinyWeights:
    """Every weight rounded to bfloat16."""

    def rounded(array: Any) -> Any:
        return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)

    layers = tuple(
        TinyLayer(**{f.name: rounded(getattr(layer, f.name)) for f in dataclasses.fields(layer)})
        for layer in weights.layers
    )
    return TinyWeights(rounded(weights.embedding), layers, rounded(weights.final_norm), rounded(weights.head))


def ignore_padding(model: onnx.ModelProto) -> None:
    """Attention looks at padded tokens too."""
    node = next(n for n in model.graph.node if n.op_type == "And")
    node.input[1] = node.input[0]


def drop_assignment(model: onnx.ModelProto) -> None:
    """Layer 0: the second expert of row 3 becomes -1, its weight 0 (in runs of more than 3 tokens)."""
    graph = model.graph
    for name, value in (
        ("moe.0.expert_ids", np.int32(-1)),
        ("moe.0.weights", np.float32(0)),
    ):
        for node in graph.node:
            for i, output in enumerate(node.output):
                if output == name:
                    node.output[i] = name + ".all"
        helper = onnx.helper.make_node
        stem = name + "."
        constants = {
            "value": np.array(value),
            "three": np.array([[3]], np.int64),
            "one": np.array([[1]], np.int64),
            "zero": np.int64(0),
            "step": np.int64(1),
            "axis": np.array([1], np.int64),
            "row": np.array([0], np.int64),
        }
        for key, constant in constants.items():
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(constant), stem + key))
        nodes = [
            helper("Shape", [name + ".all"], [stem + "shape"], start=0, end=1),
            helper("Squeeze", [stem + "shape"], [stem + "count"]),
            helper("Range", [stem + "zero", stem + "count", stem + "step"], [stem + "rows"]),
            helper("Unsqueeze", [stem + "rows", stem + "axis"], [stem + "row_column"]),
            helper("Equal", [stem + "row_column", stem + "three"], [stem + "is_row"]),
            helper("Shape", [name + ".all"], [stem + "width_1d"], start=1, end=2),
            helper("Squeeze", [stem + "width_1d"], [stem + "width"]),
            helper("Range", [stem + "zero", stem + "width", stem + "step"], [stem + "columns"]),
            helper("Unsqueeze", [stem + "columns", stem + "row"], [stem + "column_row"]),
            helper("Equal", [stem + "column_row", stem + "one"], [stem + "is_column"]),
            helper("And", [stem + "is_row", stem + "is_column"], [stem + "here"]),
            helper("Where", [stem + "here", stem + "value", name + ".all"], [name]),
        ]
        at = next(i for i, n in enumerate(graph.node) if name + ".all" in n.output) + 1
        for offset, node in enumerate(nodes):
            graph.node.insert(at + offset, node)


class ModuleReference:
    """``output = softmax(x @ weight) + shift[index]``: the yardstick of :func:`module_bundle`."""

    weight = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
    shift = np.array([0.5, -0.5], np.float32)

    def run(self, inputs: dict[str, Any]) -> TracedRun:
        x = np.asarray(inputs["x"])
        assert x.dtype == np.float32
        e = np.exp(x @ self.weight)
        share = e / e.sum(axis=-1, keepdims=True)
        return TracedRun({"output": share + self.shift[inputs["index"]][:, None, None]}, ())


def module_bundle(folder: Path, wrong: float = 0.0, frozen: int | None = None) -> Path:
    """A bundle of task ``module`` without MoE layers: x [batch, rows, 6] float32, index [batch] int64.

    ``wrong`` is added to one weight; ``frozen``: a Reshape allows only this batch, as a bad export would.
    """
    folder.mkdir()
    weight = ModuleReference.weight.copy()
    weight[2, 3] += np.float32(wrong)
    node = onnx.helper.make_node
    nodes = [
        node("MatMul", ["x", "weight"], ["scores"]),
        node("Softmax", ["scores"], ["share"], axis=-1),
        node("Gather", ["shift", "index"], ["picked"]),
        node("Unsqueeze", ["picked", "axes"], ["column"]),
        node("Add", ["share", "column"], ["output" if frozen is None else "sum"]),
    ]
    arrays = {"weight": weight, "shift": ModuleReference.shift, "axes": np.array([1, 2], np.int64)}
    if frozen is not None:
        arrays["frozen"] = np.array([frozen, -1, 5], np.int64)
        nodes.append(node("Reshape", ["sum", "frozen"], ["output"]))
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "module",
        [
            info("x", onnx.TensorProto.FLOAT, ["batch", "rows", 6]),
            info("index", onnx.TensorProto.INT64, ["batch"]),
        ],
        [info("output", onnx.TensorProto.FLOAT, ["batch", "rows", 5])],
        [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(folder / "model.onnx"))
    io = ModelIO(
        (TensorSpec("x", "float32", ("batch", "rows", 6)), TensorSpec("index", "int64", ("batch",))),
        (TensorSpec("output", "float32", ("batch", "rows", 5)),),
    )
    source = SourceInfo("module", None, "module", "ModuleReference", "0" * 64)
    write_manifest(
        folder,
        Manifest(source, "module", "onnxruntime", "float32", 20, io, Limits(max_batch=9), ()),
    )
    return folder
