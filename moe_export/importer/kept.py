"""FP8 weights that stay in the checkpoint as they are, scaled where they are used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..files import bytes_text
from ..schema import Decision
from .quantized import QuantizedTensor, QuantizedWeights
from .weight_sources import AsStored, PerExpert, StoredWeights

if TYPE_CHECKING:
    import onnx_ir as ir

FIRST_OPSET = 21
"""The first whose DequantizeLinear takes blocks; before it ONNX Runtime cannot reshape float8 either."""


def kept_tensors(stored: StoredWeights, opset: int) -> frozenset[str]:
    """Quantised tensors, by the names of the floats they stand for, that a graph can hold as they are:
    large matrices of float8 with a float32 scale per block, all experts of a projection or none."""
    from .referenced import INLINE

    if opset < FIRST_OPSET:
        return frozenset()
    kept: set[str] = set()
    for source in stored.sources.values():
        parts: tuple[tuple[str, ...], ...] = ()
        if isinstance(source, AsStored):
            large = math.prod(stored.checkpoint.weights[source.tensor].shape) > INLINE
            parts = ((source.tensor,),) if large else ()
        elif isinstance(source, PerExpert):
            parts = source.parts
        for part in parts:
            if all(_keepable(stored, name) for name in part):
                kept.update(part)
    return frozenset(kept)


def _keepable(stored: StoredWeights, name: str) -> bool:
    held, form = stored.checkpoint.quantized.get(name), stored.checkpoint.quantization
    if held is None or form is None or form.method != "fp8" or form.block is None or len(held.shape) != 2:
        return False
    return stored.checkpoint.tensors[held.parts["scale"]].dtype == "F32"


def written_bytes(found: QuantizedWeights, stored: StoredWeights, dtype: str, opset: int) -> int:
    """Bytes of the floats that a model of ``dtype`` holds in place of what is not kept."""
    size = found.written_bytes(dtype)
    for tensor in _kept(stored, opset).values():
        size -= math.prod(tensor.shape) * (4 if dtype == "float32" else 2)
    return size


def _kept(stored: StoredWeights, opset: int) -> dict[str, QuantizedTensor]:
    if stored.streamed:
        return {}
    return {name: stored.checkpoint.quantized[name] for name in kept_tensors(stored, opset)}


def quantized_decision(
    found: QuantizedWeights, stored: StoredWeights | None, dtype: str, opset: int
) -> Decision:
    """What becomes of quantised weights in a model of ``dtype``, why, and the bytes on both sides.

    ``stored``: where they are, of a model whose weights were not loaded.
    """
    text = f"{found.tensors} weights in {found.text}, {bytes_text(found.nbytes)} as published: "
    kept = {} if stored is None else _kept(stored, opset)
    if kept:
        text += (
            f"{len(kept)} stay in the checkpoint's files as they are "
            f"({bytes_text(sum(tensor.nbytes for tensor in kept.values()))}) and are scaled to float32 where "
            "they are used, those of an expert only when it has tokens. That is slower than float weights "
            "where the runtime converts float8 anew at every step, as ONNX Runtime's CPU provider does; "
            "--weights stream writes floats. "
        )
    if len(kept) < found.tensors:
        if stored is None:
            size = found.elements * (4 if dtype == "float32" else 2)
        else:
            size = written_bytes(found, stored, dtype, opset)
        number = f"{found.tensors - len(kept)} are" if kept else "all are"
        text += f"{number} read and written as floats, {bytes_text(size)}; "
        text += _why_not_kept(found, stored, opset)
    choice = "kept" if len(kept) == found.tensors else "kept in part" if kept else "dequantised"
    return Decision("quantised checkpoint", choice, text.strip())


def _why_not_kept(found: QuantizedWeights, stored: StoredWeights | None, opset: int) -> str:
    if stored is None or stored.streamed:
        return "not kept, as the weights are loaded or written anew: the target's ops take floats"
    if found.text == "MXFP4":
        return "not kept, as ONNX Runtime has no kernel that scales float4e2m1"
    if not found.text.startswith("FP8"):
        return f"not kept, as no type of ONNX holds the packed words of {found.text} as they lie"
    if opset < FIRST_OPSET:
        return f"not kept, as blocks have scales from opset {FIRST_OPSET} on: use --opset {FIRST_OPSET}"
    return (
        "kept are large matrices with a float32 scale per block, those of all experts of a projection or none"
    )


def scale_at_use(graph: ir.Graph, value: ir.Value, scale: ir.TensorProtocol, block: tuple[int, int]) -> None:
    """Give the users of ``value`` (a float8 matrix) its product with ``scale``, in the dtype it had."""
    import onnx_ir as ir

    wanted, uses = value.dtype, list(value.uses())
    assert wanted is not None and value.name is not None and value.shape is not None
    rows = int(value.shape.numpy()[0])
    value.dtype = ir.DataType.FLOAT8E4M3FN
    factors = _initializer(graph, scale)
    nodes = [ir.node("Gather", [factors, _blocks(graph, rows, block[0])], {"axis": 0})]
    attributes = {"axis": 1, "block_size": block[1]}
    nodes.append(ir.node("DequantizeLinear", [value, nodes[0].outputs[0]], attributes))
    if wanted != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": wanted.value}))
    for number, node in enumerate(nodes):
        node.name = f"{value.name}.scaled.{number}"
        node.outputs[0].name = node.name
    out = nodes[-1].outputs[0]
    out.dtype, out.shape = wanted, value.shape
    graph.insert_before(graph[0], nodes)
    for node, index in uses:
        node.replace_input_with(index, out)


def _blocks(graph: ir.Graph, count: int, block: int) -> ir.Value:
    """Of each of ``count`` rows, the block that it is in; one initializer for all matrices of a size."""
    import numpy as np
    import onnx_ir as ir

    name = f"moe_export.blocks.{count}.{block}"
    held = graph.initializers.get(name)
    if held is not None:
        return held
    return _initializer(graph, ir.tensor(np.arange(count, dtype=np.int32) // block, name=name))


def _initializer(graph: ir.Graph, tensor: Any) -> ir.Value:
    import onnx_ir as ir

    value = ir.Value(
        name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
    )
    graph.register_initializer(value)
    return value
