"""Attention over the KV cache becomes GroupQueryAttention only where running both proves them equal."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from moe_export.passes.base import PassContext
from moe_export.passes.cached_attention import CachedAttention
from moe_export.schema import ModelIO, TensorSpec

HEADS, KV_HEADS, SIZE = 4, 2, 8


def attention_context(change: str = "") -> PassContext:
    """One attention with a concatenated cache; ``change`` alters what it computes."""
    scores = {
        "": "biased = Add (scaled, bias)",
        "soft cap": "capped = Tanh (scaled)\n biased = Add (capped, bias)",
        "no mask": "biased = Identity (scaled)",
    }.get(change, "biased = Add (scaled, bias)")
    mixed = {
        "gated by its scores": """sum_axis = Constant <value_ints = [3]> ()
        strength = ReduceLogSumExp <keepdims = 1> (biased, sum_axis)
        gate = Sigmoid (strength)
        mixed = Mul (plain, gate)""",
        "keys read again": "top = ReduceMax <keepdims = 0> (present.0.key)\n mixed = Add (plain, top)",
    }.get(change, "mixed = Identity (plain)")
    keys = "rep_k = Neg (rep_k_raw)" if change == "other sign" else "rep_k = Identity (rep_k_raw)"
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, sequence, {HEADS * SIZE}] x, int64[batch, sequence] input_ids,
       int64[batch, total] attention_mask, float[batch, {KV_HEADS}, past, {SIZE}] past.0.key,
       float[batch, {KV_HEADS}, past, {SIZE}] past.0.value)
    => (float[batch, sequence, {HEADS * SIZE}] y, float[batch, {KV_HEADS}, total, {SIZE}] present.0.key,
        float[batch, {KV_HEADS}, total, {SIZE}] present.0.value)
    <int64[4] split = {{0, 0, {HEADS}, {SIZE}}}, int64[4] kv_split = {{0, 0, {KV_HEADS}, {SIZE}}},
     int64[1] zero = {{0}}, int64[1] half = {{{KV_HEADS * SIZE}}}, int64[1] two = {{2}},
     int64[3] merge = {{0, 0, -1}}, float scale = {{0.35355339059327373}}, int64[2] mask_axes = {{1, 2}},
     float one = {{1.0}},
     float lowest = {{-3.0e38}}, int64[1] last = {{{HEADS * SIZE}}},
     int64[1] group_axis = {{2}}, int64[5] repeat = {{1, 1, {HEADS // KV_HEADS}, 1, 1}}>
    {{
        q_heads = Reshape (x, split)
        q = Transpose <perm = [0, 2, 1, 3]> (q_heads)
        k_flat = Slice (x, zero, half, two)
        v_flat = Slice (x, half, last, two)
        k_heads = Reshape (k_flat, kv_split)
        v_heads = Reshape (v_flat, kv_split)
        new_k = Transpose <perm = [0, 2, 1, 3]> (k_heads)
        new_v = Transpose <perm = [0, 2, 1, 3]> (v_heads)
        present.0.key = Concat <axis = 2> (past.0.key, new_k)
        present.0.value = Concat <axis = -2> (past.0.value, new_v)
        full = Shape (present.0.key)
        wide_k = Unsqueeze (present.0.key, group_axis)
        tiled_k = Tile (wide_k, repeat)
        wide_v = Unsqueeze (present.0.value, group_axis)
        tiled_v = Tile (wide_v, repeat)
        batch_1d = Shape <start = 0, end = 1> (x)
        length = {
        "Shape <start = 2, end = 3> (present.0.key)"
        if change == "length of the cache"
        else "Shape <start = 1, end = 2> (attention_mask)"
    }
        heads_1d = Constant <value_ints = [{HEADS}]> ()
        size_1d = Constant <value_ints = [{SIZE}]> ()
        rep_shape = Concat <axis = 0> (batch_1d, heads_1d, length, size_1d)
        rep_k_raw = Reshape (tiled_k, rep_shape)
        {keys}
        rep_v = Reshape (tiled_v, rep_shape)
        keys_t = Transpose <perm = [0, 1, 3, 2]> (rep_k)
        product = MatMul (q, keys_t)
        scaled = Mul (product, scale)
        past_1d = Shape <start = 2, end = 3> (past.0.key)
        new_1d = Shape <start = 1, end = 2> (x)
        zero_0d = Constant <value_int = 0> ()
        one_0d = Constant <value_int = 1> ()
        length_0d = Squeeze (length)
        new_0d = Squeeze (new_1d)
        past_0d = Squeeze (past_1d)
        columns = Range (zero_0d, length_0d, one_0d)
        rows_0 = Range (zero_0d, new_0d, one_0d)
        rows_1 = Add (rows_0, past_0d)
        column_axis = Constant <value_ints = [1]> ()
        rows = Unsqueeze (rows_1, column_axis)
        later = Greater (columns, rows)
        mask_f = Cast <to = 1> (attention_mask)
        mask_4 = Unsqueeze (mask_f, mask_axes)
        absent = Sub (one, mask_4)
        absent_bool = Cast <to = 9> (absent)
        hidden_bool = Or (later, absent_bool)
        hidden = Cast <to = 1> (hidden_bool)
        bias = Mul (hidden, lowest)
        {scores}
        weights = Softmax <axis = -1> (biased)
        plain = MatMul (weights, rep_v)
        {mixed}
        mixed_t = Transpose <perm = [0, 2, 1, 3]> (mixed)
        y = Reshape (mixed_t, merge)
    }}"""
    for name in ("past", "present"):
        text = text.replace(f"{name}.0.", f"{name}_0_")  # the text syntax has no dots in names
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    model = ir.from_proto(proto)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = str(value.name).replace("_0_", ".0.")
    for node in model.graph:
        if node.outputs[0].name == "bias":
            node.outputs[0].shape = ir.Shape(["batch", 1, "sequence", "total"])
        if node.outputs[0].name == "q":
            node.outputs[0].shape = ir.Shape(["batch", HEADS, "sequence", SIZE])
    cache = (("key", ("batch", KV_HEADS, "past", SIZE)), ("value", ("batch", KV_HEADS, "past", SIZE)))
    inputs = (
        TensorSpec("x", "float32", ("batch", "sequence", HEADS * SIZE)),
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
        TensorSpec("attention_mask", "int64", ("batch", "total"), "mask"),
        *(TensorSpec(f"past.0.{n}", "float32", s, "cache", f"present.0.{n}") for n, s in cache),
    )
    outputs = (
        TensorSpec("y", "float32", ("batch", "sequence", HEADS * SIZE)),
        *(
            TensorSpec(f"present.0.{n}", "float32", (*s[:2], "total", SIZE), "cache", f"past.0.{n}")
            for n, s in cache
        ),
    )  # fmt: skip
    return PassContext(model, ModelIO(inputs, outputs), (), "float32", 20)


def run(context: PassContext, batch: int, new: int, past: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    mask = np.ones((batch, past + new), np.int64)
    mask[0, : (past + new) // 3] = 0
    feed = {
        "x": rng.standard_normal((batch, new, HEADS * SIZE)).astype(np.float32),
        "input_ids": np.ones((batch, new), np.int64),
        "attention_mask": mask,
    }
    for name in ("key", "value"):
        feed[f"past.0.{name}"] = rng.standard_normal((batch, KV_HEADS, past, SIZE)).astype(np.float32)
    session = ort.InferenceSession(
        ir.to_proto(context.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def op_types(context: PassContext) -> set[str]:
    return {node.op_type for node in context.model.graph}


@pytest.mark.parametrize(("batch", "new", "past"), [(1, 6, 0), (3, 4, 0), (3, 1, 9), (1, 5, 7)])
def test_replaced_and_equal(batch: int, new: int, past: int) -> None:
    before, after = attention_context(), attention_context()
    CachedAttention().apply(after)
    assert "GroupQueryAttention" in op_types(after)
    assert after.rows_apart
    valid = np.ones((batch, new), bool)
    padded = (past + new) // 3
    valid[0, : max(0, padded - past)] = False  # a row that sees no token has no defined answer
    for a, b, name in zip(run(before, batch, new, past), run(after, batch, new, past), "ykv", strict=True):
        picked = (a[valid], b[valid]) if name == "y" else (a, b)
        np.testing.assert_allclose(*picked, atol=2e-6)


def test_cache_is_shared_only_when_nothing_else_reads_it() -> None:
    context = attention_context()
    CachedAttention().apply(context)
    assert context.cache == "shared"
    assert any("updated in place" in d.choice for d in context.decisions)
    cache = [v for v in context.model.graph.inputs if str(v.name).startswith("past.")]
    assert {n.op_type for v in cache for n, _ in v.uses()} == {"GroupQueryAttention"}


def test_a_cache_that_something_else_reads_grows() -> None:
    """The buffer is longer than the tokens in it, so only the attention op may read it."""
    before, after = attention_context("keys read again"), attention_context("keys read again")
    CachedAttention().apply(after)
    assert "GroupQueryAttention" in op_types(after) and after.cache == "growing"
    for a, b in zip(run(before, 2, 1, 5), run(after, 2, 1, 5), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
    "change", ["soft cap", "no mask", "other sign", "length of the cache", "gated by its scores"]
)
def test_look_alikes_stay_plain_with_a_reason(change: str) -> None:
    context = attention_context(change)
    CachedAttention().apply(context)
    assert "GroupQueryAttention" not in op_types(context)
    assert context.cache == "growing" and not context.rows_apart
    (decision,) = context.decisions
    assert decision.choice == "plain nodes" and decision.reason
