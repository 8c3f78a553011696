"""Masks lose the nodes that compute what is known, and nothing else: every rewrite gives the same numbers."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from moe_export.passes.base import PassContext
from moe_export.passes.causal_masks import CausalMasks
from moe_export.schema import ModelIO, TensorSpec

HEADS, KV_HEADS, SIZE = 2, 1, 8

CHANGES = {
    "": {},
    "query sees one less": {"causal = LessOrEqual": "causal = Less"},
    "keys counted from 1": {
        "causal = LessOrEqual (key, query)": """later = Range (one, total_plus, one)
        later_4 = Unsqueeze (later, key_axes)
        causal = LessOrEqual (later_4, query)"""
    },
    "queries one further": {"queries = Add (new_range, past)": "queries = Add (new_range, past_plus)"},
    "some keys never seen": {"seen = And (all_true, causal)": "seen = And (not_all, causal)"},
    "a window": {"seen = And (all_true, causal)": "seen = And (near, causal)"},
    "padding from the end": {"key_index = Unsqueeze (key_wide, end)": "key_index = Unsqueeze (back, end)"},
    "count by query": {"visible = ReduceSum <keepdims = 1> (seen_f, last)": "visible = Identity (by_query)"},
}
"""Name → pieces of the graph's text replaced. Some lose a rewrite; none may change a number."""


def mask_model(change: str = "") -> ir.Model:
    """Attention with transformers' mask: causal and padding, and rows that see nothing set to zero."""
    text = f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g (float[B, S, {HEADS * SIZE}] q, float[B, S, {KV_HEADS * SIZE}] k, float[B, S, {KV_HEADS * SIZE}] v,
       float[B, {KV_HEADS}, P, {SIZE}] past_key, float[B, {KV_HEADS}, P, {SIZE}] past_value,
       int64[B, T] attention_mask)
    => (float[B, S, {HEADS * SIZE}] y, float[B, {KV_HEADS}, T, {SIZE}] present_key,
        float[B, {KV_HEADS}, T, {SIZE}] present_value)
    <int64 zero = {{0}}, int64 one = {{1}}, int64[1] last = {{-1}}, int64[1] end = {{4}},
     int64[3] key_axes = {{0, 1, 2}}, int64[3] query_axes = {{0, 1, 3}}, int64[3] batch_axes = {{1, 2, 3}},
     int64[1] one_1d = {{1}}, bool[1] all_true = {{1}}, bool[1] not_all = {{0}}, float lowest = {{-3.0e38}},
     float one_f = {{1.0}}, float nothing = {{0.0}}, int64[4] split = {{0, 0, {HEADS}, {SIZE}}},
     int64[3] merge = {{0, 0, -1}}, int64 minus = {{-1}}, int64[1] query_axis = {{2}},
     int64 two = {{2}}, int32[1] one_i = {{1}}>
    {{
        new_1d = Shape <start = 1, end = 2> (q)
        past_1d = Shape <start = 2, end = 3> (past_key)
        batch_1d = Shape <start = 0, end = 1> (q)
        new = Squeeze (new_1d)
        past = Squeeze (past_1d)
        batch = Squeeze (batch_1d)
        total = Add (past, new)
        total_plus = Add (total, one)
        past_plus = Add (past, one)
        keys = Range (zero, total, one)
        new_range = Range (zero, new, one)
        queries = Add (new_range, past)
        rows = Range (zero, batch, one)
        key = Unsqueeze (keys, key_axes)
        query = Unsqueeze (queries, query_axes)
        rows_4 = Unsqueeze (rows, batch_axes)
        causal = LessOrEqual (key, query)
        distance = Sub (query, key)
        near = Less (distance, two)
        seen = And (all_true, causal)
        mask = Cast <to = 9> (attention_mask)
        widest = Max (rows_4, key)
        wide = Shape (widest)
        row_wide = Expand (rows_4, wide)
        key_wide = Expand (key, wide)
        key_minus = Mul (key_wide, minus)
        back = Add (key_minus, minus)
        row_index = Unsqueeze (row_wide, end)
        key_index = Unsqueeze (key_wide, end)
        index = Concat <axis = -1> (row_index, key_index)
        padding = GatherND (mask, index)
        both = And (seen, padding)
        total_1d = Reshape (total, last)
        full_shape = Concat <axis = 0> (batch_1d, one_1d, new_1d, total_1d)
        allowed = Expand (both, full_shape)
        hidden = Not (allowed)
        hidden_f = Cast <to = 1> (hidden)
        bias = Mul (hidden_f, lowest)
        seen_f = Cast <to = 1> (allowed)
        by_query_sum = ReduceSum <keepdims = 1> (seen_f, query_axis)
        top = ReduceMax <keepdims = 1> (by_query_sum, last)
        by_query_0 = Shape (top)
        one_row = Concat <axis = 0> (batch_1d, one_1d, new_1d, one_1d)
        by_query = Expand (top, one_row)
        visible = ReduceSum <keepdims = 1> (seen_f, last)
        blind_1 = Less (visible, one_f)
        blind = Transpose <perm = [0, 2, 1, 3]> (blind_1)
        total_i = Cast <to = 6> (total_1d)
        less = Sub (total_i, one_i)
        lengths = Expand (less, batch_1d)
        total_0d = Squeeze (total_i)
        attended, present_key, present_value = com.microsoft.GroupQueryAttention
            <num_heads = {HEADS}, kv_num_heads = {KV_HEADS}>
            (q, k, v, past_key, past_value, lengths, total_0d, , , , bias)
        heads = Reshape (attended, split)
        kept = Where (blind, nothing, heads)
        merged = Reshape (kept, merge)
        y = Identity (merged)
        }}"""
    for old, new in CHANGES[change].items():
        assert old in text
        text = text.replace(old, new)
    model = ir.from_proto(onnx.parser.parse_model(text))
    shapes = {
        "causal": (1, 1, "S", "T"), "near": (1, 1, "S", "T"), "seen": (1, 1, "S", "T"),
        "padding": ("B", 1, 1, "T"), "both": ("B", 1, "S", "T"), "allowed": ("B", 1, "S", "T"),
        "bias": ("B", 1, "S", "T"), "key": (1, 1, 1, "T"), "query": (1, 1, "S", 1), "rows_4": ("B", 1, 1, 1),
        "later": ("T",), "later_4": (1, 1, 1, "T"), "merged": ("B", "S", HEADS * SIZE),
        "keys": ("T",), "rows": ("B",), "new_range": ("S",), "visible": ("B", 1, "S", 1),
        "blind": ("B", "S", 1, 1), "attended": ("B", "S", HEADS * SIZE), "heads": ("B", "S", HEADS, SIZE),
        "mask": ("B", "T"), "y": ("B", "S", HEADS * SIZE),
    }  # fmt: skip
    types = {"bias": 1, "attended": 1, "heads": 1, "visible": 1, "y": 1, "seen_f": 1, "merged": 1}
    for node in model.graph:
        for out in node.outputs:
            if out.name in shapes:
                out.shape = ir.Shape(shapes[out.name])
            if out.name in types:
                out.dtype = ir.DataType(types[out.name])
    return model


def context_of(model: ir.Model) -> PassContext:
    graph = model.graph
    inputs = tuple(TensorSpec(str(v.name), "float32", ("B",)) for v in graph.inputs)
    outputs = tuple(TensorSpec(str(v.name), "float32", ("B",)) for v in graph.outputs)
    return PassContext(model, ModelIO(inputs, outputs), (), "float32", 20)


def run(model: ir.Model, batch: int, new: int, past: int, side: str) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(batch + new + past)
    mask = np.ones((batch, past + new), np.int64)
    for row in range(batch):
        hidden = min(row, past + new - 1) if side != "none" else 0
        mask[row, :hidden] = side != "left"
        mask[row, mask.shape[1] - hidden :] = side != "right"
    feeds = {
        "q": rng.standard_normal((batch, new, HEADS * SIZE)),
        "k": rng.standard_normal((batch, new, KV_HEADS * SIZE)),
        "v": rng.standard_normal((batch, new, KV_HEADS * SIZE)),
        "past_key": rng.standard_normal((batch, KV_HEADS, past, SIZE)),
        "past_value": rng.standard_normal((batch, KV_HEADS, past, SIZE)),
    }
    return session.run(
        ["y"], {**{n: a.astype(np.float32) for n, a in feeds.items()}, "attention_mask": mask}
    )[0]


@pytest.mark.parametrize("change", CHANGES)
def test_the_numbers_stay(change: str) -> None:
    """Also for masks that only look causal: those keep the nodes that make the difference."""
    before, after = mask_model(change), mask_model(change)
    CausalMasks().apply(context_of(after))
    for shape in ((1, 5, 0), (3, 5, 0), (1, 1, 4), (3, 1, 4), (1, 4, 3)):
        for side in ("none", "left", "right"):
            expected = run(before, *shape, side)
            np.testing.assert_array_equal(run(after, *shape, side), expected, f"{change} {shape} {side}")


def test_a_causal_mask_is_left_to_the_attention() -> None:
    model = mask_model()
    context = context_of(model)
    CausalMasks().apply(context)
    left = {node.op_type for node in model.graph}
    assert not left & {"LessOrEqual", "GatherND", "ReduceSum", "Or", "And"}
    (decision,) = context.decisions
    assert "1 causal biases" in decision.reason and "1 counts" in decision.reason
    assert "1 outputs masked" in decision.reason


def test_the_changes_are_seen() -> None:
    """The comparison above would notice: each change gives other numbers than the plain mask."""
    plain = run(mask_model(), 3, 5, 0, "left")
    for change in CHANGES:
        if change:
            assert not np.array_equal(run(mask_model(change), 3, 5, 0, "left"), plain), change


@pytest.mark.parametrize(
    "change", ["query sees one less", "keys counted from 1", "queries one further", "a window"]
)
def test_look_alikes_keep_their_comparison(change: str) -> None:
    model = mask_model(change)
    CausalMasks().apply(context_of(model))
    assert {"LessOrEqual", "Less"} & {node.op_type for node in model.graph}
    assert "CumSum" not in {node.op_type for node in model.graph}


def test_a_graph_without_masks_is_left_alone() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Relu (x) }"""
    context = context_of(ir.from_proto(onnx.parser.parse_model(text)))
    CausalMasks().apply(context)
    assert context.decisions == [] and [n.op_type for n in context.model.graph] == ["Relu"]
