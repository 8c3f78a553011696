"""The weights of a traced graph as references into the checkpoint, in place of the hollow model's zeros.

After this, every initializer gives the true values when it is read, whoever reads it: what lies in the
checkpoint as the graph needs it is an external tensor there, the rest is read or converted at that moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..graph.expert_tensors import EXPERT_SCALES, EXPERT_TENSORS, SCALE_OF
from ..ops import DOMAIN
from .kept import kept_tensors, scale_at_use
from .weight_sources import AsStored, PerExpert, StoredWeights, WeightSource

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

INLINE = 8192
"""Elements up to which a weight is kept in the graph: what optimisers fold."""

_DTYPES = {"F64": "DOUBLE", "F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "I64": "INT64",
           "I32": "INT32", "I16": "INT16", "I8": "INT8", "U8": "UINT8", "BOOL": "BOOL",
           "F8_E4M3": "FLOAT8E4M3FN"}  # fmt: skip


def refer_to_weights(model: ir.Model, stored: StoredWeights, prefix: str = "model.") -> None:
    """Replace the value of every initializer that is a weight of the model (its name is ``prefix`` and the
    model's own name for it).

    A weight stored in another float type than the graph computes in keeps its type and is cast where it is
    used; our own ops read it as it is.

    Raises:
        ExportError: a weight of the graph is none of the model, so that nobody knows its values.
    """
    import onnx_ir as ir

    graph = model.graph
    kept = kept_tensors(stored, graph.opset_imports.get("", 0))
    for value in list(graph.initializers.values()):
        name = (value.name or "").removeprefix(prefix)
        source = stored.sources.get(name)
        held = value.const_value
        if source is None:
            refuse_hollow(value)
            continue
        if held is None:
            continue
        if held.size <= INLINE:
            dtype = held.dtype
            value.const_value = ir.tensor(_numpy(stored, name, dtype), dtype=dtype, name=value.name)
            continue
        if isinstance(source, AsStored) and source.tensor in kept:
            value.const_value = _kept(stored, source.tensor, value.name or "")
            scale_at_use(graph, value, _scale(stored, source.tensor, f"{value.name}_scale"), _block(stored))
            continue
        tensor = _tensor(stored, name, source, value, kept)
        value.const_value = tensor
        if tensor.dtype != value.dtype:
            _cast_at_use(graph, value, tensor.dtype)


def refuse_hollow(value: ir.Value) -> None:
    """Refuse an initializer that is no weight of the model and looks like one that nobody filled in.

    Raises:
        ExportError: it is large and all its numbers are zero.
    """
    held = value.const_value
    if held is None or held.size <= INLINE or not held.dtype.is_floating_point() or held.numpy().any():
        return
    raise ExportError(
        f"initializer {value.name!r} of {held.size} elements was made from weights that were not loaded; "
        "export with --weights load"
    )


def _tensor(
    stored: StoredWeights, name: str, source: WeightSource, value: ir.Value, kept: frozenset[str]
) -> Any:
    import onnx_ir as ir

    shape = value.shape
    assert shape is not None and value.name is not None and value.dtype is not None
    if isinstance(source, AsStored):
        return _place(stored, source.tensor, value.name)
    if isinstance(source, PerExpert):
        dtypes = {stored.checkpoint.weights[n].dtype for n in source.tensors}
        dtype = _onnx_dtype(dtypes.pop()) if len(dtypes) == 1 else value.dtype
        stack = ir.LazyTensor(
            lambda: ir.tensor(_numpy(stored, name, dtype), dtype=dtype),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=value.name,
        )
        prefix = prefix_of(value.name)
        stack.meta[EXPERT_TENSORS] = tuple(
            tuple((_kept if t in kept else _place)(stored, t, f"{prefix}{t}") for t in part)
            for part in source.parts
        )
        stack.meta[EXPERT_SCALES] = tuple(
            (_scales(stored, part, f"{prefix}{part[0]}_scales"), _block(stored)) if part[0] in kept else None
            for part in source.parts
        )
        return stack
    dtype = value.dtype
    return ir.LazyTensor(
        lambda: ir.tensor(_numpy(stored, name, dtype), dtype=dtype),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=value.name,
    )


def prefix_of(name: str) -> str:
    """The part of an initializer's name that the graph put before the model's own."""
    return name.partition(".")[0] + "."


def _numpy(stored: StoredWeights, name: str, dtype: ir.DataType) -> Any:
    return as_numpy(stored.weight(name), dtype)


def as_numpy(tensor: torch.Tensor, dtype: ir.DataType) -> NDArray[Any]:
    """A tensor as numbers of ``dtype``; NumPy itself has no bfloat16."""
    import ml_dtypes
    import torch

    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16).astype(dtype.numpy(), copy=False)
    return tensor.numpy().astype(dtype.numpy(), copy=False)


def _place(stored: StoredWeights, tensor: str, name: str) -> ir.TensorProtocol:
    """A tensor where it lies in the checkpoint; one that is quantised there is computed when it is read."""
    if tensor in stored.checkpoint.quantized:
        return _streamed(stored, tensor, name)
    return _external(stored, tensor, name)


def _kept(stored: StoredWeights, tensor: str, name: str) -> ir.ExternalTensor:
    """The codes of a quantised tensor where they lie in the checkpoint."""
    return _external(stored, stored.checkpoint.quantized[tensor].parts["weight"], name)


def _scale(stored: StoredWeights, tensor: str, name: str) -> ir.TensorProtocol:
    made = _external(stored, stored.checkpoint.quantized[tensor].parts["scale"], name)
    made.meta[SCALE_OF] = tensor
    return made


def _scales(stored: StoredWeights, tensors: tuple[str, ...], name: str) -> ir.TensorProtocol:
    """The scales of several tensors as one, read when it is written."""
    import numpy as np
    import onnx_ir as ir

    parts = [stored.checkpoint.quantized[tensor].parts["scale"] for tensor in tensors]
    made = ir.LazyTensor(
        lambda: ir.tensor(np.stack([part.numpy() for part in stored.parts(parts)])),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape((len(parts), *stored.checkpoint.tensors[parts[0]].shape)),
        name=name,
    )
    made.meta[SCALE_OF] = tensors
    return made


def _block(stored: StoredWeights) -> tuple[int, int]:
    form = stored.checkpoint.quantization
    assert form is not None and form.block is not None
    return form.block


def _external(stored: StoredWeights, tensor: str, name: str) -> ir.ExternalTensor:
    import onnx_ir as ir

    info = stored.checkpoint.tensors[tensor]
    # Without a base_dir, as onnx_ir refuses to read files of several names below one: those are what an
    # earlier export and hub caches leave.
    return ir.ExternalTensor(
        stored.path(tensor).absolute(),
        info.begin,
        info.nbytes,
        _onnx_dtype(info.dtype),
        shape=ir.Shape(info.shape),
        name=name,
        base_dir="",
    )


def _streamed(stored: StoredWeights, tensor: str, name: str) -> ir.TensorProtocol:
    import onnx_ir as ir

    held = stored.checkpoint.quantized[tensor]
    dtype = _onnx_dtype(held.dtype)

    class Streamed(ir.LazyTensor):
        """Written piece by piece, so that no stack of experts is ever whole in memory."""

        def tofile(self, file: Any) -> None:
            for piece in stored.pieces(tensor):
                file.write(as_numpy(piece, dtype).reshape(-1).view("u1").data)

    return Streamed(
        lambda: ir.tensor(as_numpy(stored.tensor(tensor), dtype), dtype=dtype),
        dtype=dtype,
        shape=ir.Shape(held.shape),
        name=name,
    )


def _onnx_dtype(name: str) -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType[_DTYPES[name]]


def _cast_at_use(graph: ir.Graph, value: ir.Value, stored: ir.DataType) -> None:
    """The initializer in its stored dtype; a Cast for those who need the graph's."""
    import onnx_ir as ir

    wanted = value.dtype
    assert wanted is not None and value.name is not None
    uses = list(value.uses())
    value.dtype = stored
    others = []
    for node, index in uses:
        if node.domain == DOMAIN:
            continue
        # Only the rows looked up are cast; and a runtime that transposes when it loads does so in half the
        # memory before the cast.
        if node.op_type in ("Gather", "Transpose") and index == 0:
            _cast_output(graph, node, stored, wanted)
            continue
        others.append((node, index))
    if not others:
        return
    cast = ir.node("Cast", [value], attributes={"to": wanted.value}, name=f"{value.name}.cast")
    cast.outputs[0].name = f"{value.name}.{wanted.name.lower()}"
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, wanted
    graph.insert_before(graph[0], cast)
    for node, index in others:
        node.replace_input_with(index, cast.outputs[0])


def _cast_output(graph: ir.Graph, node: ir.Node, stored: ir.DataType, wanted: ir.DataType) -> None:
    import onnx_ir as ir

    out = node.outputs[0]
    cast = ir.node("Cast", [out], attributes={"to": wanted.value})
    cast.outputs[0].shape, cast.outputs[0].type = out.shape, ir.TensorType(wanted)
    users = list(out.uses())
    name, out.name = out.name, f"{out.name}.{stored.name.lower()}"
    cast.outputs[0].name = name
    out.dtype = stored
    for user, index in users:
        if user is not cast:
            user.replace_input_with(index, cast.outputs[0])
    graph.insert_after(node, cast)
