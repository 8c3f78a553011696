"""Whether GroupQueryAttention equals one attention of a graph: both are run on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..graph.subgraph import ancestors, extract, session_of
from ..schema import ModelIO
from .base import PassContext

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

TOLERANCE = {"float32": 2e-6, "float16": 4e-3}
"""Largest difference from the plain nodes, relative to max(1, |value|): rounding of sums."""
SHAPES = ((1, 5, 0), (2, 5, 0), (2, 1, 7), (1, 3, 7), (3, 1, 0))
"""(batch, new tokens, past) on which both are run."""


@dataclass(frozen=True)
class CacheAttention:
    """Attention over a layer's cache: ``query`` [B, Hq, S, D], new ``key`` and ``value`` [B, Hkv, S, D]."""

    layer: str
    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    bias: ir.Value
    output: ir.Value
    heads: int
    kv_heads: int
    head_size: int


def fixed_dims(value: ir.Value) -> list[int | None]:
    """The shape of ``value`` with None for every symbolic dimension; empty when it is unknown."""
    return [d if isinstance(d, int) else None for d in value.shape] if value.shape is not None else []


def proven_scale(context: PassContext, found: CacheAttention) -> float | None:
    """The scale with which the op equals the plain nodes; None if there is none."""
    import numpy as np

    outputs = [found.output, found.present_key, found.present_value]
    cut = [found.query, found.key, found.value, found.past_key, found.past_value, found.bias]
    # Both sides' shapes may be computed from any input of the graph.
    free = _inputs_reached(context.model, outputs, cut)
    piece = extract(context.model, [*cut, *free], outputs)
    if piece is None or found.query.dtype is None:
        return None
    dtype = found.query.dtype.numpy()
    tolerance = TOLERANCE.get(str(dtype))
    if tolerance is None:
        return None
    plain, op = _session(piece), _session(_op_model(found, context.opset, str(dtype)))
    scales = [1.0, found.head_size**-0.5, *_scalars(outputs, cut)]
    for scale in dict.fromkeys(scales):
        if all(
            _equal(plain(feed), op({**names(feed), "scale": np.asarray(scale, dtype)}), tolerance)
            for feed, names in _cases(context.io, found, free, dtype)
        ):
            return float(scale)
    return None


def _inputs_reached(model: ir.Model, outputs: list[ir.Value], cut: list[ir.Value]) -> list[ir.Value]:
    nodes, _ = ancestors(outputs, cut)
    used = {id(v) for n in nodes for v in n.inputs if v is not None}
    taken = {id(v) for v in cut}
    return [v for v in model.graph.inputs if id(v) in used and id(v) not in taken]


def _scalars(outputs: list[ir.Value], cut: list[ir.Value]) -> Iterator[float]:
    nodes, _ = ancestors(outputs, cut)
    for node in nodes:
        for value in node.inputs:
            tensor = value.const_value if value is not None else None
            if tensor is not None and tensor.size == 1 and tensor.dtype.is_floating_point():
                number = float(tensor.numpy().reshape(-1)[0])
                yield from (number, number * number)


Run = Callable[[dict[str, Any]], "list[NDArray[Any]]"]


def _session(proto: onnx.ModelProto) -> Run:
    session = session_of(proto)
    return lambda feed: session.run(None, feed)


def _op_model(found: CacheAttention, opset: int, dtype: str) -> onnx.ModelProto:
    """GroupQueryAttention alone, from 4-axis query, key and value; ``scale`` is applied to the query."""
    import numpy as np
    import onnx.parser
    from onnx import helper, numpy_helper

    t = {"float32": "float", "float16": "float16"}[dtype]
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    attention ({t}[b, h, s, d] query, {t}[b, g, s, d] key, {t}[b, g, s, d] value, {t}[b, g, p, d] past_key,
               {t}[b, g, p, d] past_value, {t}[b, i, s, t] bias, {t} scale)
    => ({t}[b, h, s, d] out, {t}[b, g, t, d] present_key, {t}[b, g, t, d] present_value) {{
        scaled = Mul (query, scale)
        q_t = Transpose <perm = [0, 2, 1, 3]> (scaled)
        k_t = Transpose <perm = [0, 2, 1, 3]> (key)
        v_t = Transpose <perm = [0, 2, 1, 3]> (value)
        q = Reshape (q_t, merge)
        k = Reshape (k_t, merge)
        v = Reshape (v_t, merge)
        batch = Shape <start = 0, end = 1> (query)
        total = Shape <start = 3, end = 4> (bias)
        total_32 = Cast <to = 6> (total)
        one = Constant <value = int32[1] {{1}}> ()
        last = Sub (total_32, one)
        lengths = Expand (last, batch)
        total_0d = Squeeze (total_32)
        y, present_key, present_value = com.microsoft.GroupQueryAttention <num_heads = {found.heads},
            kv_num_heads = {found.kv_heads}, scale = 1.0>
            (q, k, v, past_key, past_value, lengths, total_0d, , , , bias)
        y_heads = Reshape (y, split)
        out = Transpose <perm = [0, 2, 1, 3]> (y_heads)
    }}"""
    model = onnx.parser.parse_model(text)
    for name, values in (("merge", [0, 0, -1]), ("split", [0, 0, found.heads, found.head_size])):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
    return helper.make_model(model.graph, opset_imports=list(model.opset_import), ir_version=10)


def _cases(io: ModelIO, found: CacheAttention, free: list[ir.Value], dtype: Any) -> Iterator[tuple[Any, Any]]:
    """Feeds for the plain piece, each with a function that renames it for the op."""
    import numpy as np

    rng = np.random.default_rng(5)
    specs = {s.name: s for s in io.inputs}
    wide = fixed_dims(found.bias)[1]
    for batch, new, past in SHAPES:
        total = past + new
        sizes = {"batch": batch, "sequence": new, "past": past, "total": total}
        bias = np.where(
            rng.random((batch, wide or 1, new, total)) < 0.3,
            np.finfo(dtype).min,
            rng.standard_normal((batch, wide or 1, new, total)),
        )
        bias[..., 0] = 0.0
        # The op attends causally by itself: what comes later must be masked for both.
        later = np.arange(total)[None, :] > np.arange(past, total)[:, None]
        bias = np.where(later, np.finfo(dtype).min, bias).astype(dtype)
        arrays = {
            "query": rng.standard_normal((batch, found.heads, new, found.head_size)),
            "key": rng.standard_normal((batch, found.kv_heads, new, found.head_size)),
            "value": rng.standard_normal((batch, found.kv_heads, new, found.head_size)),
            "past_key": rng.standard_normal((batch, found.kv_heads, past, found.head_size)),
            "past_value": rng.standard_normal((batch, found.kv_heads, past, found.head_size)),
            "bias": bias,
        }
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        feed = {str(getattr(found, name).name): array for name, array in arrays.items()}
        for value in free:
            spec = specs[str(value.name)]
            shape = [d if isinstance(d, int) else sizes[d] for d in spec.shape]
            feed[spec.name] = np.ones(shape, np.dtype(spec.dtype))
        yield feed, lambda _feed, arrays=arrays: arrays


def _equal(a: list[NDArray[Any]], b: list[NDArray[Any]], tolerance: float) -> bool:
    import numpy as np

    return all(
        x.shape == y.shape
        and np.allclose(x.astype(np.float64), y.astype(np.float64), rtol=tolerance, atol=tolerance)
        for x, y in zip(a, b, strict=True)
    )
