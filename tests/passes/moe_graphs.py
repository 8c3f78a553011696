"""Small graphs with one or more MoE layers, written as ONNX text: what passes work on, without a traced "
"model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from moe_export.graph.functions import attach_functions
from moe_export.graph.moe_values import name_moe_values
from moe_export.ops import OPS
from moe_export.passes.base import PassContext
from moe_export.schema import ModelIO, TensorSpec

HIDDEN, INNER, EXPERTS, TOP_K, OPSET = 6, 5, 8, 2, 20
ELEM = {"float32": "float", "float16": "float16"}

SOFTMAX_RENORMALISED = """
    scores = Softmax <axis = -1> (logits)
    best, chosen = TopK <axis = -1> (scores, k)
    total = ReduceSum <keepdims = 1> (best, last)
    weights = Div (best, total)
"""
"""Mixtral's router."""


def constants() -> dict[str, NDArray[Any]]:
    """Initializers that routers in text may use."""
    return {
        "k": np.array([TOP_K], np.int64),
        "one_1d": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
        "axis_0": np.array([0], np.int64),
    }


def layer_text(
    router: str,
    *,
    index: int = 0,
    hidden: str = "hidden",
    drops: int = 0,
    transposed: int = 0,
    name: str | None = None,
) -> str:
    """One MoE layer: ``router`` makes ``chosen`` (int64 [T, K]) and ``weights`` from ``logits`` [T, E].

    Its values end in ``_<index>``, its result is ``out_<index>``.
    """
    return f"""
    logits = MatMul ({hidden}, router_{index})
    {router}
    ids = Cast <to = 6> (chosen)
    order, offsets, token_of = moe_export.Dispatch
        <num_experts = {EXPERTS}, drops = {drops}, layer = "{name or f"layer{index}"}"> (ids)
    expert_rows = Gather <axis = 0> ({hidden}, token_of)
    expert_inner = moe_export.GroupedMatMul <transposed = {transposed}> (expert_rows, up_{index}, offsets)
    expert_active = Relu (expert_inner)
    expert_out = moe_export.GroupedMatMul <transposed = {transposed}> (expert_active, down_{index}, offsets)
    out_{index} = moe_export.Combine (expert_out, order, weights)
    """


def layer_weights(index: int = 0, *, transposed: int = 0, experts: int = EXPERTS) -> dict[str, NDArray[Any]]:
    """The weights that :func:`layer_text` reads."""
    rng = np.random.default_rng(index)
    shapes = {"up": (experts, HIDDEN, INNER), "down": (experts, INNER, HIDDEN)}
    stacks = {n: s if transposed else (s[0], s[2], s[1]) for n, s in shapes.items()}
    made = {f"{n}_{index}": rng.standard_normal(s) * 0.4 for n, s in stacks.items()}
    made[f"router_{index}"] = rng.standard_normal((HIDDEN, experts))
    return {n: a.astype(np.float32) for n, a in made.items()}


def model_of(
    text: str,
    initializers: Mapping[str, NDArray[Any]],
    *,
    outputs: str = "",
    inputs: str = "",
    result: str = "out_0",
    dtype: str = "float32",
) -> ir.Model:
    """A model from ``hidden`` [tokens, H] to ``out`` that runs ``text``, with shapes inferred and bodies
    attached.

    ``inputs`` and ``outputs``: more of them, in ONNX text.
    """
    elem = ELEM[dtype]
    proto = onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : {OPSET}, "moe_export" : 1]>
    g ({elem}[tokens, {HIDDEN}] hidden{inputs}) => ({elem}[tokens, {HIDDEN}] out{outputs})
    {{ {text}
       out = Identity ({result}) }}
    """)
    for name, array in {**constants(), **initializers}.items():
        cast = array.astype(dtype) if array.dtype == np.float32 else array
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(numpy_helper.from_array(cast, name))
    _declare_our_ops(proto, onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.FLOAT)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    attach_functions(model, OPSET)
    return model


def _declare_our_ops(proto: onnx.ModelProto, dtype: int) -> None:
    """What onnx's shape inference cannot know: results of our ops, and how many experts a token has."""
    routed = ["tokens", TOP_K]
    results = {
        "Router": [(onnx.TensorProto.FLOAT, routed), (onnx.TensorProto.INT32, routed)],
        "Dispatch": [(onnx.TensorProto.INT64, ["assignments"])] * 3,
        "GroupedMatMul": [(dtype, ["assignments", None])],
        "Combine": [(dtype, ["tokens", HIDDEN])],
    }
    declared = {}
    for node in proto.graph.node:
        for name, (elem, shape) in zip(node.output, results.get(node.op_type, []), strict=False):
            declared[name] = onnx.helper.make_tensor_value_info(name, elem, shape)
        if node.op_type == "Dispatch":
            name = node.input[0]
            declared[name] = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, routed)
    proto.graph.value_info.extend(declared.values())


def context_of(model: ir.Model, *, dtype: str = "float32", **options: Any) -> PassContext:
    """The model as passes get it."""
    io = ModelIO(
        tuple(TensorSpec(v.name, "float32", ("tokens", HIDDEN)) for v in model.graph.inputs),
        tuple(TensorSpec(v.name, "float32", ("tokens", HIDDEN)) for v in model.graph.outputs),
    )
    return PassContext(model, io, name_moe_values(model), dtype, OPSET, options)


def one_layer(
    router: str = SOFTMAX_RENORMALISED,
    *,
    more: Mapping[str, NDArray[Any]] | None = None,
    dtype: str = "float32",
    **layer: Any,
) -> PassContext:
    """One MoE layer with this router."""
    transposed = layer.get("transposed", 0)
    weights = {**layer_weights(transposed=transposed), **(more or {})}
    return context_of(model_of(layer_text(router, **layer), weights, dtype=dtype), dtype=dtype)


def run(
    model: ir.Model, hidden: NDArray[Any], names: tuple[str, ...] = ("out",), **more: Any
) -> list[NDArray[Any]]:
    """The model in stock ONNX Runtime; ``names`` may be any values of it."""
    proto = ir.to_proto(model)
    for name in names:
        if all(o.name != name for o in proto.graph.output):
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    if any(i.name == "moe_capacity" for i in session.get_inputs()):  # as many rows as there are tokens
        more.setdefault("moe_capacity", np.zeros(max(len(hidden), 1), np.int32))
    return list(session.run(list(names), {"hidden": hidden, **more}))


def tokens(count: int, dtype: str = "float32", scale: float = 1.0) -> NDArray[Any]:
    """Random hidden states [count, H]."""
    return (np.random.default_rng(count).standard_normal((count, HIDDEN)) * scale).astype(dtype)


def inlined_router(**attributes: Any) -> str:
    """The Router op's own body as plain nodes of a layer's router."""
    full = OPS["Router"].complete({"top_k": TOP_K, **attributes})
    body = OPS["Router"].body(full, OPSET)
    for name in ("top_k", "n_group", "topk_group", "capacity"):
        body = body.replace(f"<value_int : int = @{name}>", f"<value_int = {full[name]}>")
    for name in ("scale", "epsilon"):
        body = body.replace(f"<value_float : float = @{name}>", f"<value_float = {full[name]:.25f}>")
    assert "@" not in body
    return f"{body.replace('weights = ', 'weights = ', 1)}\n chosen = Cast <to = 7> (expert_ids)"
