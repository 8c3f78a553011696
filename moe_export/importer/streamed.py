"""The weights of a traced graph as tensors that are read from the checkpoint when they are written.

For targets that lay weights out anew. The graph becomes the one that a loaded model gives, weights in its own
dtype and linear layers' matrices turned already, so every pass takes it; but no weight is held in memory, and
stacks of experts are read one matrix at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .referenced import INLINE, as_numpy, refuse_hollow
from .weight_sources import AsStored, PerExpert, StoredWeights, WeightSource

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from ..graph.expert_stacks import Matrices

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stream_weights(model: ir.Model, stored: StoredWeights, prefix: str = "model.") -> None:
    """Replace the value of every initializer that is a weight of the model (its name is ``prefix`` and the
    model's own name for it).

    Raises:
        ExportError: a weight of the graph is none of the model, so that nobody knows its values.
    """
    import onnx_ir as ir

    graph = model.graph
    for value in list(graph.initializers.values()):
        name, held = (value.name or "").removeprefix(prefix), value.const_value
        if held is None:
            continue
        source = stored.sources.get(name)
        if source is None:
            refuse_hollow(value)
        elif held.size <= INLINE:
            array = as_numpy(stored.weight(name), held.dtype)
            value.const_value = ir.tensor(array, dtype=held.dtype, name=value.name)
        else:
            value.const_value = _tensor(stored, name, source, value, held.dtype)
    _turn(graph)


def _tensor(
    stored: StoredWeights, name: str, source: WeightSource, value: ir.Value, dtype: ir.DataType
) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir as ir

    from ..graph.expert_stacks import ExpertStack

    assert value.shape is not None
    shape = value.shape.numpy()
    if isinstance(source, PerExpert):
        experts = tuple(zip(*source.parts, strict=True))

        def matrices() -> Matrices:
            return lambda e: np.concatenate([as_numpy(stored.tensor(n), dtype) for n in experts[e]])

        return ExpertStack(matrices, dtype, shape, value.name)
    if isinstance(source, AsStored) and len(shape) == 3 and _plain(stored, source.tensor):
        tensor = source.tensor
        return ExpertStack(lambda: lambda e: _read(stored, tensor, dtype, e), dtype, shape, value.name)

    quantized = stored.checkpoint.quantized.get(source.tensor) if isinstance(source, AsStored) else None
    if quantized is not None and quantized.stack and len(shape) == 3:
        held = quantized.name
        return ExpertStack(lambda: lambda e: as_numpy(stored.piece(held, e), dtype), dtype, shape, value.name)

    def whole() -> ir.TensorProtocol:
        if isinstance(source, AsStored) and _plain(stored, source.tensor):
            array = _read(stored, source.tensor, dtype)
        else:
            array = as_numpy(stored.weight(name), dtype)
        return ir.tensor(array, dtype=dtype)

    return ir.LazyTensor(whole, dtype=dtype, shape=ir.Shape(shape), name=value.name)


def _plain(stored: StoredWeights, tensor: str) -> bool:
    """Whether the tensor lies in its file as floats."""
    info = stored.checkpoint.tensors.get(tensor)
    return info is not None and info.dtype in _FLOATS


def _read(stored: StoredWeights, tensor: str, dtype: ir.DataType, index: int | None = None) -> NDArray[Any]:
    """A float tensor, or its part ``index`` of the first axis, read from its file and not mapped: mapped
    pages would count as this process's memory."""
    import math

    import ml_dtypes
    import numpy as np

    info = stored.checkpoint.tensors[tensor]
    kind = np.dtype(ml_dtypes.bfloat16 if info.dtype == "BF16" else _FLOATS[info.dtype])
    shape, begin = info.shape, info.begin
    if index is not None:
        shape = shape[1:]
        begin += index * math.prod(shape) * kind.itemsize
    bits = np.fromfile(stored.path(tensor), np.dtype(f"u{kind.itemsize}"), math.prod(shape), offset=begin)
    return bits.view(kind).reshape(shape).astype(dtype.numpy(), copy=False)


def _turn(graph: ir.Graph) -> None:
    """Take the Transpose of a streamed matrix into the matrix: an optimiser would read and hold it."""
    import onnx_ir as ir

    made: dict[int, ir.Value] = {}
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        held = value.const_value if value is not None else None
        if value is None or not isinstance(held, ir.LazyTensor):
            continue
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else (1, 0)
        if len(held.shape) != 2 or tuple(order) != (1, 0):
            continue
        if id(value) not in made:
            made[id(value)] = _turned(graph, held)
        node.outputs[0].replace_all_uses_with(made[id(value)], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if not value.uses() and value.name is not None:
            del graph.initializers[value.name]


def _turned(graph: ir.Graph, held: ir.LazyTensor) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    rows, columns = held.shape.numpy()
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(held.numpy().T), dtype=held.dtype),
        dtype=held.dtype,
        shape=ir.Shape((columns, rows)),
        name=f"{held.name}.turned",
    )
    value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(held.dtype), shape=tensor.shape)
    graph.register_initializer(value)
    return value
