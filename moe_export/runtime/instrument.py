"""Variants of a bundle's model that show the routing of every MoE layer, or take it from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import BundleError, InputError
from moe_export.runtime.tensors import numpy_dtype
from moe_export.schema import MoELayer
from moe_export.trace import LayerTrace

Array = NDArray[Any]

_FLOATS = ("float32", "float16", "bfloat16", "float64")


def traced_values(layers: Iterable[MoELayer]) -> list[str]:
    """Names of the values that a traced run reads, layer by layer."""
    return [name for layer in layers for name in _values(layer) if name is not None]


def _values(layer: MoELayer) -> tuple[str | None, ...]:
    return layer.expert_ids, layer.weights, layer.hidden, layer.output, layer.logits


def traced_model(
    model_path: Path, layers: Sequence[MoELayer], *, force_routing: bool, show: bool = True
) -> bytes:
    """The model with the layers' values as outputs, serialised; external data is referred to, not read.

    With ``force_routing``, ``expert_ids`` and ``weights`` of every layer are inputs (int32 and float32 [T,
    K], or the dtype the graph declares for them) instead of results of its router. Without ``show`` the
    outputs stay those of the model.

    Raises:
        BundleError: a value is not in the graph, or forcing it would not decide what the layer computes.
    """
    import onnx

    model = onnx.load(model_path, load_external_data=False)
    graph = model.graph
    produced = {name for node in graph.node for name in node.output}
    given = {value.name for value in (*graph.input, *graph.output)}
    for layer in layers:
        for name in filter(None, _values(layer)):
            if name not in produced and name not in given:
                raise BundleError(
                    f"{model_path}: MoE layer {layer.index} ({layer.name}): no value {name!r} in the graph"
                )
    if force_routing:
        _cut_routers(model, layers, str(model_path))
        given |= {value.name for value in graph.input}
    for name in traced_values(layers) if show else ():
        if name not in given:
            # ONNX Runtime infers the type of an output that declares none.
            graph.output.append(onnx.ValueInfoProto(name=name))
            given.add(name)
    serialised: bytes = model.SerializeToString()
    return serialised


def _cut_routers(model: Any, layers: Sequence[MoELayer], label: str) -> None:
    """Make routing values graph inputs. Their producers write to unused names and are pruned at load."""
    import onnx

    graph = model.graph
    declared = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    defaults = {}
    for layer in layers:
        defaults[layer.expert_ids] = (onnx.TensorProto.INT32, layer.top_k)
        defaults[layer.weights] = (onnx.TensorProto.FLOAT, layer.top_k)
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name in defaults:
                node.output[i] = f"{name}.computed"
    for name, (default, top_k) in defaults.items():
        kind = declared.get(name) or default
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [f"{name}.tokens", top_k]))
    producers = {name: node for node in graph.node for name in node.output}
    for layer in layers:
        needed = _ancestors(producers, layer.output)
        for name in (layer.expert_ids, layer.weights):
            if name not in needed:
                raise BundleError(
                    f"{label}: MoE layer {layer.index} ({layer.name}) does not compute its output from "
                    f"{name!r}, so routing cannot be forced; a pass has detached that value"
                )
        if layer.logits in needed:
            raise BundleError(
                f"{label}: MoE layer {layer.index} ({layer.name}) computes its output from {layer.logits!r} "
                "beside its routing values, so routing cannot be forced"
            )


def _ancestors(producers: dict[str, Any], name: str) -> set[str]:
    """Every value that ``name`` is computed from, through subgraphs too."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        node = producers.get(waiting.pop())
        if node is None:
            continue
        fresh = set(_reads(node)) - seen
        seen |= fresh
        waiting.extend(fresh)
    return seen


def _reads(node: Any) -> Iterable[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)


def layer_traces(layers: Sequence[MoELayer], outputs: dict[str, Array]) -> tuple[LayerTrace, ...]:
    """The traces in ``outputs`` of a traced run.

    Raises:
        BundleError: a value's shape or dtype is not what :class:`MoELayer` says.
    """
    return tuple(_layer_trace(layer, outputs) for layer in layers)


def _layer_trace(layer: MoELayer, outputs: dict[str, Array]) -> LayerTrace:
    ids = outputs[layer.expert_ids]
    tokens = len(ids)
    wide = {
        layer.expert_ids: layer.top_k,
        layer.weights: layer.top_k,
        layer.hidden: layer.hidden_size,
        layer.output: layer.hidden_size,
    }
    if layer.logits is not None:
        wide[layer.logits] = layer.num_experts
    for name, width in wide.items():
        array = outputs[name]
        if array.shape != (tokens, width):
            raise BundleError(
                f"MoE layer {layer.index} ({layer.name}): {name!r} has shape {list(array.shape)}; expected "
                f"[{tokens}, {width}]"
            )
        kinds = ("int32", "int64") if name == layer.expert_ids else _FLOATS
        if array.dtype.name not in kinds:
            raise BundleError(f"MoE layer {layer.index} ({layer.name}): {name!r} has dtype {array.dtype}")

    def floats(name: str) -> NDArray[np.float32]:
        return outputs[name].astype(np.float32)

    return LayerTrace(
        index=layer.index,
        name=layer.name,
        expert_ids=ids.astype(np.int32),
        weights=floats(layer.weights),
        hidden=floats(layer.hidden),
        output=floats(layer.output),
        logits=None if layer.logits is None else floats(layer.logits),
    )


def check_routing(layers: Sequence[MoELayer], routing: Sequence[LayerTrace]) -> None:
    """Refuse traces that cannot replace the routing of ``layers``: one trace per layer, in the same order.

    Raises:
        InputError: traces missing, or of the wrong shape or range.
    """
    if not layers:
        raise InputError("force_routing: this bundle has no MoE layer")
    if len(routing) != len(layers):
        raise InputError(f"force_routing has {len(routing)} layers; the bundle has {len(layers)}")
    for layer, trace in zip(layers, routing, strict=True):
        where = f"force_routing, MoE layer {layer.index} ({layer.name})"
        if trace.index != layer.index:
            raise InputError(f"{where}: got the trace of layer {trace.index}")
        shape = (len(trace.expert_ids), layer.top_k)
        for what, array in (("expert_ids", trace.expert_ids), ("weights", trace.weights)):
            if array.shape != shape:
                raise InputError(f"{where}: {what} has shape {list(array.shape)}; expected {list(shape)}")
        ids = trace.expert_ids
        if ids.size and (ids.min() < -1 or ids.max() >= layer.num_experts):
            raise InputError(f"{where}: expert ids must lie in -1 (dropped) to {layer.num_experts - 1}")


def forced_feeds(
    layers: Sequence[MoELayer], routing: Sequence[LayerTrace], dtypes: dict[str, np.dtype[Any]]
) -> dict[str, Array]:
    """Inputs that replay checked ``routing``, in the dtypes the graph takes."""
    feeds: dict[str, Array] = {}
    for layer, trace in zip(layers, routing, strict=True):
        for name, array in ((layer.expert_ids, trace.expert_ids), (layer.weights, trace.weights)):
            feeds[name] = np.ascontiguousarray(array, dtype=dtypes[name])
    return feeds


def dtype_of(ort_type: str) -> np.dtype[Any]:
    """The NumPy dtype of an ONNX Runtime tensor type such as ``tensor(float)``."""
    name = ort_type.removeprefix("tensor(").removesuffix(")")
    return numpy_dtype({"float": "float32", "double": "float64"}.get(name, name))
