"""What the kernels refuse: an ONNX Runtime error that names the op, the input and the value, no crash."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from moe_export.backends.onnxruntime.runner import ort_error_types
from moe_export.ops import DOMAIN, OPS
from tests.ops.cases import expert_ids, expert_inputs, randoms

from .kernels import in_kernel, refusal, session


def experts(**changes: Any) -> dict[str, Any]:
    """Good inputs of ExpertMLP (T = 5, K = 2, E = 4, H = 6, I = 4), some replaced."""
    return {**expert_inputs({}, expert_ids(5, 2, 4), 4, "float32", "float32"), **changes}


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


LOGITS = np.zeros((3, 4), np.float32)
ROUTER: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"logits": ones(3)}, {"top_k": 1}, "input logits has shape [3]; expected 2 dimensions"),
    ({"logits": LOGITS}, {"top_k": 5}, "attribute top_k is 5, more than the experts"),
    ({"logits": ones(2, 0)}, {"top_k": 1}, "input logits has shape [2, 0]"),
    ({"logits": LOGITS}, {"top_k": 1, "n_group": 3}, "attribute n_group is 3; expected a divisor"),
    (
        {"logits": LOGITS, "selection_bias": ones(3)},
        {"top_k": 1, "biased": 1},
        "input selection_bias has shape [3]; expected 4 (experts)",
    ),
    (
        {"logits": LOGITS, "selection_bias": np.array([0, np.nan, 0, 0], np.float32)},
        {"top_k": 1, "biased": 1},
        "selection_bias[1] is nan",
    ),
    ({"logits": LOGITS, "selection_bias": ones(4)}, {"top_k": 1}, "attribute biased is 0"),
    (
        {"logits": LOGITS, "sequence_length": np.array(0, np.int64)},
        {"top_k": 1, "capacity": 1},
        "input sequence_length is 0; expected at least 1",
    ),
    (
        {"logits": LOGITS, "sequence_length": ones(2, dtype=np.int64)},
        {"top_k": 1, "capacity": 1},
        "input sequence_length has shape [2]; expected a single number",
    ),
]


@pytest.mark.parametrize(("inputs", "attributes", "message"), ROUTER, ids=[c[2][:40] for c in ROUTER])
def test_router(inputs: dict[str, Any], attributes: dict[str, Any], message: str) -> None:
    said = refusal("Router", inputs, attributes)
    assert "moe_export.Router: " in said
    assert message in said


def test_capacity_without_a_sequence_length() -> None:
    running = session(node_model("Router", {"logits": F32}, {"top_k": 1, "capacity": 1}))
    with pytest.raises(ort_error_types(), match="Router: input sequence_length is missing"):
        running.run(None, {"logits": LOGITS})


@pytest.mark.parametrize(
    ("value", "shown"), [(np.nan, "nan"), (-np.nan, "nan"), (np.inf, "inf")], ids=["nan", "-nan", "inf"]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"])
@pytest.mark.parametrize("place", [(0, 0), (30, 7), (63, 63)])
def test_logits_that_are_no_numbers(value: float, shown: str, score: str, place: tuple[int, int]) -> None:
    logits = randoms("float32", 64, 64)
    logits[place] = value
    said = refusal("Router", {"logits": logits}, {"top_k": 2, "score": score})
    assert f"moe_export.Router: logits[{place[0]}, {place[1]}] is {shown}; expected finite logits" in said


@pytest.mark.parametrize("score", ["softmax", "softmax_after_topk"])
def test_a_token_with_all_experts_masked(score: str) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1] = -np.inf
    said = refusal("Router", {"logits": logits}, {"top_k": 2, "score": score})
    assert "moe_export.Router: logits of token 1 give weights that are not finite" in said


DISPATCH = [
    ({"expert_ids": ones(3, dtype=np.int32)}, {}, "input expert_ids has shape [3]; expected 2 dimensions"),
    (
        {"expert_ids": np.array([[0, 1], [2, -1]], np.int32)},
        {"drops": 0},
        "expert_ids[1, 1] is -1; attribute drops = 0 promises 0 to 2",
    ),
    (
        {"expert_ids": np.array([[0, 1], [3, 0]], np.int32)},
        {"drops": 0},
        "expert_ids[1, 0] is 3; attribute drops = 0 promises 0 to 2",
    ),
]


@pytest.mark.parametrize(("inputs", "attributes", "message"), DISPATCH, ids=[c[2][:30] for c in DISPATCH])
def test_dispatch(inputs: dict[str, Any], attributes: dict[str, Any], message: str) -> None:
    said = refusal("Dispatch", inputs, {"num_experts": 3, **attributes})
    assert f"moe_export.Dispatch: {message}" in said


def grouped(rows: Any, weight: Any, offsets: list[int]) -> dict[str, Any]:
    return {"rows": rows, "weight": weight, "offsets": np.array(offsets, np.int64)}


GROUPED = [
    (grouped(ones(4), ones(2, 5, 6), [0, 2, 4]), "input rows has shape [4]; expected 2 dimensions"),
    (grouped(ones(4, 7), ones(2, 5, 6), [0, 2, 4]), "input weight has shape [2, 5, 6]; expected 7 (columns"),
    (grouped(ones(4, 6), ones(2, 5, 6), [0, 2]), "input offsets has shape [2]; expected 3 (experts"),
    (grouped(ones(4, 6), ones(2, 5, 6), [0, 2, 5]), "offsets[2] is 5; expected 2 to 4"),
    (grouped(ones(4, 6), ones(2, 5, 6), [-1, 2, 4]), "offsets[0] is -1; expected 0 to 4"),
    (grouped(ones(4, 6), ones(2, 5, 6), [2, 0, 4]), "offsets[1] is 0; expected 2 to 4"),
]


@pytest.mark.parametrize(("inputs", "message"), GROUPED, ids=[c[1][:30] for c in GROUPED])
def test_grouped_matmul(inputs: dict[str, Any], message: str) -> None:
    assert f"moe_export.GroupedMatMul: {message}" in refusal("GroupedMatMul", inputs, {})


def combined(rows: Any, order: list[int], weights: Any) -> dict[str, Any]:
    return {"rows": rows, "order": np.array(order, np.int64), "weights": weights}


COMBINE = [
    (combined(ones(3, 6), [0, 1, 2], ones(2, 2)), "input rows has shape [3, 6]; expected 4 (tokens times"),
    (combined(ones(4, 6), [0, 1, 2], ones(2, 2)), "input order has shape [3]; expected 4 (rows)"),
    (combined(ones(4, 6), [0, 1, 2, 4], ones(2, 2)), "order[3] is 4; expected 0 to 3"),
    (combined(ones(4, 6), [0, -1, 2, 3], ones(2, 2)), "order[1] is -1; expected 0 to 3"),
    (combined(ones(4, 6), [0, 1, 1, 3], ones(2, 2)), "order[2] is 1, and so is order[1]"),
]


@pytest.mark.parametrize(("inputs", "message"), COMBINE, ids=[c[1][:30] for c in COMBINE])
def test_combine(inputs: dict[str, Any], message: str) -> None:
    assert f"moe_export.Combine: {message}" in refusal("Combine", inputs, {})


EXPERTS = [
    (experts(hidden=ones(5)), "input hidden has shape [5]; expected 2 dimensions"),
    (experts(hidden=ones(4, 6)), "input expert_ids has shape [5, 2]; expected 4 (rows of hidden)"),
    (experts(weights=ones(5, 3)), "input weights has shape [5, 3]; expected 2 (columns of expert_ids)"),
    (experts(hidden=ones(5, 7)), "input up has shape [4, 8, 6]; expected 7 (columns of hidden)"),
    (experts(up=ones(3, 8, 6)), "input up has shape [3, 8, 6]; expected 4 (attribute num_experts)"),
    (experts(up=ones(4, 9, 6)), "input up has shape [4, 9, 6]; expected 8 (twice the intermediate size"),
    (experts(down=ones(4, 6, 0)), "input down has shape [4, 6, 0]; it is empty"),
    (experts(hidden=ones(5, 0)), "input hidden has shape [5, 0]; expected columns"),
    (experts(up=ones(4, 8)), "input up has shape [4, 8]; expected 3 dimensions"),
]


@pytest.mark.parametrize(("inputs", "message"), EXPERTS, ids=[c[1][:40] for c in EXPERTS])
def test_expert_mlp(inputs: dict[str, Any], message: str) -> None:
    assert f"moe_export.ExpertMLP: {message}" in refusal("ExpertMLP", inputs, {"num_experts": 4})


def test_a_session_works_on_after_a_refusal() -> None:
    good = {"logits": randoms("float32", 5, 8)}
    before = in_kernel("Router", good, {"top_k": 2})
    refusal("Router", {"logits": np.full((5, 8), np.nan, np.float32)}, {"top_k": 2})
    after = in_kernel("Router", good, {"top_k": 2})
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def node_model(op: str, dtypes: dict[str, int], attributes: dict[str, Any]) -> onnx.ModelProto:
    """A model of one node, unchecked: ``dtypes`` by input, in order; an empty name is a missing input."""
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in dtypes.items() if name]
    outputs = [helper.make_tensor_value_info(p.name, 0, None) for p in OPS[op].outputs]
    for value in outputs:
        value.ClearField("type")
    node = helper.make_node(
        op, list(dtypes), [p.name for p in OPS[op].outputs], name="the node", domain=DOMAIN, **attributes
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


F32, F64, I32, I64 = (getattr(onnx.TensorProto, n) for n in ("FLOAT", "DOUBLE", "INT32", "INT64"))
MLP = {"hidden": F32, "expert_ids": I32, "weights": F32, "up": F32, "down": F32}
LOADING: list[tuple[str, dict[str, int], dict[str, Any], str]] = [
    ("Router", {"logits": F64}, {"top_k": 1}, "tensor(double)"),
    ("Router", {"logits": F32}, {}, "attribute top_k is 0; expected at least 1"),
    ("Router", {"logits": F32}, {"top_k": -1}, "attribute top_k is -1"),
    ("Router", {"logits": F32}, {"top_k": 1.5}, "attribute top_k is no integer"),
    ("Router", {"logits": F32}, {"top_k": 1, "score": "hard"}, "attribute score is 'hard'; expected one of"),
    ("Router", {"logits": F32}, {"top_k": 1, "score": 3}, "attribute score is no string"),
    ("Router", {"logits": F32}, {"top_k": 1, "scale": "x"}, "attribute scale is no float"),
    ("Router", {"logits": F32}, {"top_k": 1, "scale": float("inf")}, "attribute scale is not finite"),
    (
        "Router",
        {"logits": F32},
        {"top_k": 1, "renormalize": 2},
        "attribute renormalize is 2; expected 0 or 1",
    ),
    (
        "Router",
        {"logits": F32},
        {"top_k": 1, "topk_group": 2},
        "attribute topk_group is 2, more than n_group",
    ),
    ("Router", {"logits": F32}, {"top_k": 1, "capacity": -1}, "attribute capacity is -1"),
    ("Router", {"logits": F32}, {"top_k": 1, "biased": 1}, "input selection_bias is missing"),
    ("Router", {"logits": F32, "b": I64}, {"top_k": 1, "biased": 1}, "input selection_bias has dtype int64"),
    ("Dispatch", {"expert_ids": I64}, {"num_experts": 1}, "tensor(int64)"),
    ("Dispatch", {"expert_ids": I32}, {"num_experts": 0}, "attribute num_experts is 0"),
    ("GroupedMatMul", {"rows": F32, "weight": F64, "offsets": I64}, {}, "input weight has dtype float64"),
    ("Combine", {"rows": F64, "order": I64, "weights": F32}, {}, "tensor(double)"),
    ("ExpertMLP", {**MLP, "up": I32}, {"num_experts": 2}, "input up has dtype int32"),
    ("ExpertMLP", {**MLP, "down": onnx.TensorProto.FLOAT16}, {"num_experts": 2}, "different dtypes"),
    ("ExpertMLP", MLP, {"num_experts": 2, "activation": "swish"}, "attribute activation is 'swish'"),
    (
        "ExpertMLP",
        MLP,
        {"num_experts": 2, "activation": "clamped_swiglu", "gated": 0},
        "which needs gated = 1",
    ),
    ("ExpertMLP", MLP, {"num_experts": 2, "biased": 1}, "input up_bias is missing; attribute biased is 1"),
    ("ExpertMLP", {**MLP, "up_bias": F32}, {"num_experts": 2, "biased": 1}, "input down_bias is missing"),
    ("ExpertMLP", {**MLP, "up_bias": F32}, {"num_experts": 2}, "a bias is given; attribute biased is 0"),
    ("ExpertMLP", {**MLP, "": 0, "down_bias": F32}, {"num_experts": 2, "biased": 1}, "up_bias is missing"),
    ("ExpertMLP", MLP, {"num_experts": 2, "packed": 1, "transposed": 1}, "packed and transposed are both 1"),
    ("ExpertMLP", MLP, {"num_experts": 2, "packed": 1, "layout": "interleaved"}, "layout = concatenated"),
]


@pytest.mark.parametrize(
    ("op", "dtypes", "attributes", "message"), LOADING, ids=[f"{c[0]}: {c[3][:40]}" for c in LOADING]
)
def test_refused_at_load(op: str, dtypes: dict[str, int], attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ort_error_types()) as caught:
        session(node_model(op, dtypes, attributes))
    assert message in str(caught.value)
    assert op in str(caught.value)
