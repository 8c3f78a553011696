"""bfloat16 for GPUs: which products change, what stays float32, and that a CPU run of it is near the
original."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from moe_export.passes.base import PassContext
from moe_export.passes.bfloat16_products import BFloat16Products
from moe_export.schema import ModelIO, TensorSpec

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[n, 64] x, int64[n] ids, bool few) => (float[n, 64] y, float[n, 32] attention, float[n, 64]
branch)
<float[64, 64] w = {WEIGHT}, float[64] bias = {BIAS}, float[8, 16, 64] table = {TABLE}, float[64, 16] gate =
{GATE}>
{
    product = Gemm (x, w, bias)
    logits = MatMul (x, gate)
    rows = Gather <axis = 0> (table, ids)
    axis = Constant <value_ints = [1]> ()
    column = Unsqueeze (x, axis)
    terms = Mul (rows, column)
    last = Constant <value_ints = [-1]> ()
    sums = ReduceSum <keepdims = 0> (terms, last)
    both = Concat <axis = 1> (logits, sums)
    turned = Transpose <perm = [1, 0]> (x)
    scores = MatMul (x, turned)
    probabilities = Softmax <axis = -1> (scores)
    attention = MatMul (probabilities, both)
    y = Relu (product)
    branch = If (few) <
        then_branch = one () => (float[n, 64] a) { a = MatMul (x, w) },
        else_branch = two () => (float[n, 64] b) { b = MatMul (y, w) }
    >
}
"""


def context(dtype: str = "bfloat16", kept: tuple[str, ...] = ()) -> PassContext:
    draw = np.random.default_rng(0)
    text = TEXT
    for name, shape in (("WEIGHT", (64, 64)), ("BIAS", (64,)), ("TABLE", (8, 16, 64)), ("GATE", (64, 16))):
        values = draw.normal(size=int(np.prod(shape))) / 8
        text = text.replace("{" + name + "}", "{" + ", ".join(f"{v:.6f}" for v in values) + "}")
    model = ir.from_onnx_text(text)
    inputs = (("x", "float32", ("n", 64)), ("ids", "int64", ("n",)), ("few", "bool", ()))
    outputs = (("y", ("n", 64)), ("attention", ("n", 32)), ("branch", ("n", 64)))
    io = ModelIO(
        tuple(TensorSpec(*spec) for spec in inputs), tuple(TensorSpec(n, "float32", s) for n, s in outputs)
    )
    return PassContext(model, io, (), dtype, 20, float32_weights=frozenset(kept))


def dtypes_of_products(model: ir.Model) -> list[str]:
    """Of the second factor of every MatMul and Gemm, subgraphs included."""
    nodes = [n for n in model.graph.all_nodes() if n.op_type in ("MatMul", "Gemm")]
    return [
        str(n.inputs[1].dtype.name)
        for n in nodes
        if n.inputs[1] is not None and n.inputs[1].dtype is not None
    ]


def on_the_cpu(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    """ONNX Runtime has no bfloat16 products: their factors, rounded already, are multiplied as float32."""
    for node in list(model.graph.all_nodes()):
        if node.op_type in ("MatMul", "Gemm") and node.outputs[0].dtype == ir.DataType.BFLOAT16:
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            for index in (0, 1):
                cast = ir.node("Cast", [node.inputs[index]], attributes={"to": 1})
                cast.outputs[0].name = f"{node.outputs[0].name}.{index}"
                graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))


def test_products_take_bfloat16_and_compute_the_same_but_for_rounding() -> None:
    feeds = {"x": np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32), "ids": np.arange(5)}
    for few in (True, False):
        feeds["few"] = np.array(few)
        plain = on_the_cpu(context("float32").model, feeds)
        lowered = context()
        BFloat16Products().apply(lowered)
        got = on_the_cpu(lowered.model, feeds)
        for want, have in zip(plain, got, strict=True):
            assert want.dtype == have.dtype == np.float32
            error = np.abs(want - have).max() / np.abs(want).max()
            assert 0 < error < 2e-2
    assert np.abs(plain[2] - got[0]).max() > 0.1, "the comparison tells different values apart"


def test_what_is_stored_and_what_stays_float32() -> None:
    lowered = context()
    BFloat16Products().apply(lowered)
    stored = {
        v.name: v.const_value.dtype.name for v in lowered.model.graph.initializers.values() if v.const_value
    }
    assert stored == {
        "w.bfloat16": "BFLOAT16", "table.bfloat16": "BFLOAT16", "gate.bfloat16": "BFLOAT16", "bias": "FLOAT"
    }  # fmt: skip
    assert set(dtypes_of_products(lowered.model)) == {"BFLOAT16"}
    gather = next(n for n in lowered.model.graph if n.op_type == "Gather")
    assert gather.outputs[0].dtype == ir.DataType.BFLOAT16, "what is gathered is cast, not the whole table"
    assert "3 weights stored in bfloat16, 6 products" in lowered.decisions[-1].choice
    names = [o.name for n in lowered.model.graph.all_nodes() for o in n.outputs]
    assert len(names) == len(set(names))


def test_router_logits_and_kept_weights_are_float32_products() -> None:
    from moe_export.schema import MoELayer

    lowered = context(kept=("w",))
    layer = MoELayer(0, "m", 16, 2, 64, 8, "x", "ids", "both", "sums", "logits")
    lowered.layers = (layer,)
    BFloat16Products()._run(lowered)
    products = {n.outputs[0].name: n for n in lowered.model.graph if n.op_type in ("MatMul", "Gemm")}
    assert products["logits"].outputs[0].dtype in (None, ir.DataType.FLOAT)
    assert products["logits"].inputs[1].dtype == ir.DataType.FLOAT
    assert "w" in lowered.model.graph.initializers and "product" in products


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_left_alone(dtype: str) -> None:
    left = context(dtype)
    before = ir.to_proto(left.model).SerializeToString()
    BFloat16Products().apply(left)
    assert ir.to_proto(left.model).SerializeToString() == before and not left.decisions
