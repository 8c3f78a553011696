"""The lowered graph of a TensorRT target on the CPU: ONNX Runtime, and GPU kernels under the interpreter.

Products of bfloat16 run as float32 products of bfloat16 numbers, rounded to bfloat16 afterwards: what tensor
cores give, up to the order of summation. ONNX Runtime's CPU provider has no bfloat16 product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError
from ..graph.functions import PLUGIN_ATTRIBUTES
from ..ops import DOMAIN

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from ..runtime.engine import Engine

    Array = NDArray[Any]

PluginOp = Callable[[str, Sequence["Array | None"], Mapping[str, Any]], Sequence["Array"]]
"""Runs one plugin node: op, inputs in the node's order, attributes of the op → outputs."""
_PRODUCTS = ("MatMul", "Gemm")


class SimulatedGraph:
    """A model whose plugin nodes are run by ``plugin``, and everything between them by ONNX Runtime."""

    def __init__(
        self, model: onnx.ModelProto, folder: Path, label: str, plugin: PluginOp, threads: int | None = None
    ) -> None:
        """``folder``: where external data lies."""
        self._folder, self._label, self._threads, self._plugin = folder, label, threads, plugin
        self.inputs = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
        self.outputs = tuple(v.name for v in model.graph.output)
        self._model = widen_products(model)
        self._stored = {t.name: t for t in self._model.graph.initializer}
        self._constants: dict[str, Array] = {}
        self._stages = _stages(self._model, set(self.inputs), set(self._stored), self.outputs)
        self._engines: dict[int, Engine] = {}
        self.plugin_nodes = sum(len(stage.plugins) for stage in self._stages)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for inputs of the right names, dtypes and shapes.

        Raises:
            BundleError: ONNX Runtime cannot load or run a piece.
            CheckFailed, UsageError, EnvironmentLacksError: a kernel fails, or cannot be run here.
        """
        values: dict[str, Array] = dict(feeds)
        for number, stage in enumerate(self._stages):
            if stage.outputs:
                if number not in self._engines:
                    self._engines[number] = self._load(stage, values)
                values.update(self._engines[number].run({name: values[name] for name in stage.inputs}))
            for node in stage.plugins:
                given = [self._value(name, values) for name in node.input]
                attributes = {
                    a.name: _attribute(a) for a in node.attribute if a.name not in PLUGIN_ATTRIBUTES
                }
                results = self._plugin(node.op_type, given, attributes)
                values.update(zip(node.output, results, strict=True))
        return {name: values[name] for name in self.outputs}

    def _value(self, name: str, values: Mapping[str, Array]) -> Array | None:
        if not name:
            return None
        if name in values:
            return values[name]
        if name not in self._constants:
            self._constants[name] = _stored_array(self._stored[name], self._folder)
        return self._constants[name]

    def _load(self, stage: _Stage, values: Mapping[str, Array]) -> Engine:
        """The stage as a session; dtypes of its inputs are those of the values at hand."""
        import onnx

        from ..backends.onnxruntime.runner import create_session
        from ..runtime.engine import Engine

        graph = onnx.GraphProto(name="stage")
        graph.node.extend(stage.nodes)
        graph.initializer.extend(self._stored[name] for name in stage.stored)
        for name in stage.inputs:
            kind = self.inputs.get(name) or onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * values[name].ndim))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in stage.outputs)
        piece = onnx.ModelProto(ir_version=self._model.ir_version)
        piece.graph.CopyFrom(graph)
        piece.opset_import.extend(self._model.opset_import)
        piece.functions.extend(self._model.functions)
        label = f"{self._label} (simulated)"
        session = create_session(
            piece.SerializeToString(),
            threads=self._threads,
            folder=self._folder,
            prepack=False,
            label=label,
            plugin=False,
        )
        return Engine(session, label, stage.outputs)


def _stored_array(tensor: onnx.TensorProto, folder: Path) -> Array:
    """A tensor's numbers. Read here, since onnx refuses files of several names, which those of merged ranks
    have; the bundle's check has looked at where they lie."""
    import onnx

    held = onnx.TensorProto()
    held.CopyFrom(tensor)
    if onnx.external_data_helper.uses_external_data(tensor):
        place = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / place["location"]).open("rb") as stream:
            stream.seek(int(place.get("offset", 0)))
            held.raw_data = stream.read(int(place.get("length", -1)))
        del held.external_data[:]
        held.data_location = onnx.TensorProto.DEFAULT
    array: Array = onnx.numpy_helper.to_array(held)
    return array


@dataclass
class _Stage:
    """Nodes that run once the plugin nodes of the stages before have run, and the plugin nodes after them."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    plugins: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)


def _is_plugin(node: onnx.NodeProto) -> bool:
    names = {a.name for a in node.attribute}
    return node.domain == DOMAIN and set(PLUGIN_ATTRIBUTES) <= names


def _stages(
    model: onnx.ModelProto, inputs: set[str], stored: set[str], outputs: Sequence[str]
) -> list[_Stage]:
    """The graph cut at its plugin nodes."""
    level: dict[str, int] = {}
    stages = [_Stage()]
    for node in model.graph.node:
        here = max((level.get(name, 0) for name in reads(node)), default=0)
        while len(stages) <= here + 1:
            stages.append(_Stage())
        plugin = _is_plugin(node)
        (stages[here].plugins if plugin else stages[here].nodes).append(node)
        for name in node.output:
            level[name] = here + plugin
    needed = set(outputs)
    for stage in reversed(stages):
        for node in stage.plugins:
            needed |= set(node.input)
        made = {name for node in stage.nodes for name in node.output if name}
        stage.outputs = sorted(made & needed)
        read = {name for node in stage.nodes for name in reads(node) if name} - made
        stage.stored = sorted(read & stored)
        known = inputs | set(level)
        stage.inputs = sorted((read - stored) & known) if stage.outputs else []
        needed |= set(stage.inputs)
    return [stage for stage in stages if stage.outputs or stage.plugins]


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every name that a node reads, in its subgraphs too (names made there included)."""
    yield from node.input
    for graph in _subgraphs(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from reads(inner)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    import onnx

    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _attribute(attribute: onnx.AttributeProto) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def widen_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each bfloat16 product as a float32 one between casts; itself where it has none.

    Raises:
        BundleError: the dtypes of the graph cannot be inferred.
    """
    import onnx

    kinds = {t.data_type for t in model.graph.initializer}
    if onnx.TensorProto.BFLOAT16 not in kinds:
        return model
    try:
        typed = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        first = str(error).splitlines()[0]
        raise BundleError(f"the lowered graph has no consistent dtypes: {first}") from error
    result = onnx.ModelProto()
    result.CopyFrom(typed)
    _widen(result.graph, {})
    return result


def _widen(graph: onnx.GraphProto, outer: Mapping[str, int]) -> None:
    import onnx

    kinds = dict(outer)
    declared: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.value_info, *graph.output)
    kinds.update({v.name: v.type.tensor_type.elem_type for v in declared})
    kinds.update({t.name: t.data_type for t in graph.initializer})
    half = onnx.TensorProto.BFLOAT16
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for inner in _subgraphs(node):
            _widen(inner, kinds)
        if node.op_type not in _PRODUCTS or kinds.get(node.input[0]) != half:
            nodes.append(node)
            continue
        wide = onnx.NodeProto()
        wide.CopyFrom(node)
        for index, name in enumerate(node.input):
            wide.input[index] = f"{node.output[0]}.wide.{index}"
            nodes.append(
                onnx.helper.make_node("Cast", [name], [wide.input[index]], to=onnx.TensorProto.FLOAT)
            )
        wide.output[0] = f"{node.output[0]}.wide"
        nodes.append(wide)
        nodes.append(onnx.helper.make_node("Cast", [wide.output[0]], [node.output[0]], to=half))
    del graph.node[:]
    graph.node.extend(nodes)
