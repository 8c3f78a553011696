"""Each kernel of the CPU plugin against the op's float64 reference and against its ONNX body."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_export.ops import OPS
from moe_export.ops.contract import FLOAT_TYPES
from tests.ops.cases import EXPERTS, ROUTERS, expert_ids, expert_inputs, randoms, router_inputs, routings
from tests.ops.one_op import NUMPY, assert_equal, expected, in_onnxruntime, problem

from .kernels import in_kernel

FLOATS = [(rows, weight) for rows in FLOAT_TYPES for weight in FLOAT_TYPES]


def check(name: str, dtype: str, inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
    """The kernel gives what the reference gives, and the dtypes and shapes of the body."""
    got = in_kernel(name, inputs, attributes)
    assert_equal(name, dtype, got, expected(name, inputs, attributes))
    body = in_onnxruntime(name, inputs, attributes)
    assert [(a.dtype, a.shape) for a in got] == [(a.dtype, a.shape) for a in body]


def test_dispatch() -> None:
    for ids, experts in routings():
        check("Dispatch", "int64", {"expert_ids": ids}, {"num_experts": experts})


def test_dispatch_sorts_strangers_by_their_id() -> None:
    ids = np.array([[7, -1, 0], [-3, 9, 7], [2**31 - 1, -(2**31), 1]], np.int32)
    check("Dispatch", "int64", {"expert_ids": ids}, {"num_experts": 2})


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("dtype", "weight_dtype"), FLOATS)
def test_grouped_matmul(dtype: str, weight_dtype: str, transposed: int) -> None:
    for ids, experts in routings():
        order, offsets, _ = OPS["Dispatch"].reference(ids, experts)
        for inner, columns in ((6, 5), (80, 130)):
            shape = (experts, inner, columns) if transposed else (experts, columns, inner)
            weight = randoms("float32", *shape, seed=1) * inner**-0.5
            inputs = {
                "rows": randoms(dtype, len(order), inner),
                "weight": weight.astype(NUMPY[weight_dtype]),
                "offsets": offsets,
            }
            check("GroupedMatMul", dtype, inputs, {"transposed": transposed})


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_combine(dtype: str) -> None:
    for ids, experts in routings():
        order, _, _ = OPS["Dispatch"].reference(ids, experts)
        for hidden in (1, 6, 300):
            inputs = {
                "rows": randoms(dtype, len(order), hidden),
                "order": order,
                "weights": randoms("float32", *ids.shape, seed=1),
            }
            check("Combine", dtype, inputs, {})


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("router", ROUTERS)
def test_router(router: str, dtype: str) -> None:
    for tokens in (0, 1, 8, 40):
        for top_k in (1, 2, 4):
            attributes = {"top_k": top_k, **ROUTERS[router]}
            # Groups have to leave as many experts as are chosen.
            if attributes.get("n_group", 1) * top_k > 8 * attributes.get("topk_group", 1):
                continue
            check("Router", dtype, router_inputs(attributes, dtype, tokens), attributes)


@pytest.mark.parametrize("bias_dtype", FLOAT_TYPES)
def test_router_bias_of_another_dtype(bias_dtype: str) -> None:
    attributes = {"top_k": 3, "score": "sigmoid", "biased": 1}
    inputs = router_inputs(attributes, "float32", 16)
    inputs["selection_bias"] = inputs["selection_bias"].astype(NUMPY[bias_dtype])
    check("Router", "float32", inputs, attributes)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"])
def test_router_of_all_experts_gives_the_lower_id_first_among_equals(score: str) -> None:
    logits = np.array([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 3.0, 3.0, 3.0]], np.float32)
    _, ids = in_kernel("Router", {"logits": logits}, {"top_k": 4, "score": score})
    assert ids.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [1, 2, 3, 0]]


def test_a_masked_expert_is_chosen_last_and_weighs_nothing() -> None:
    logits = np.array([[-np.inf, 0.0, 1.0]], np.float32)
    weights, ids = in_kernel("Router", {"logits": logits}, {"top_k": 3})
    assert ids.tolist() == [[2, 1, 0]]
    assert weights[0, 2] == 0.0
    assert weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("form", EXPERTS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), FLOATS)
def test_expert_mlp(form: str, dtype: str, weight_dtype: str) -> None:
    # Every pair of dtypes with every form; every routing where both are float32.
    every = dtype == weight_dtype == "float32"
    for ids, experts in routings() if every else [(expert_ids(7, 2, 4), 4)]:
        attributes = {"num_experts": experts, **EXPERTS[form]}
        inputs = expert_inputs(EXPERTS[form], ids, experts, dtype, weight_dtype)
        check("ExpertMLP", dtype, inputs, attributes)


@pytest.mark.parametrize("form", [form for form in EXPERTS if not EXPERTS[form].get("packed")])
def test_the_fused_op_is_the_chain(form: str) -> None:
    """ExpertMLP against Dispatch, GroupedMatMul and Combine by their kernels, activation by the reference."""
    from moe_export.ops.expert_mlp import activate

    attributes = {"num_experts": 4, **EXPERTS[form]}
    ids = expert_ids(9, 2, 4, strangers=False)
    inputs = expert_inputs(EXPERTS[form], ids, 4, "float32", "float32")
    (fused,) = in_kernel("ExpertMLP", inputs, attributes)
    order, offsets, tokens = in_kernel("Dispatch", {"expert_ids": ids}, {"num_experts": 4})
    transposed = {"transposed": attributes.get("transposed", 0)}
    owner = ids.reshape(-1)[order]

    def grouped(rows: Any, weight: Any, bias: Any) -> Any:
        (out,) = in_kernel("GroupedMatMul", {"rows": rows, "weight": weight, "offsets": offsets}, transposed)
        return out if bias is None else out + bias[owner]

    inner = grouped(inputs["hidden"][tokens], inputs["up"], inputs["up_bias"])
    full = OPS["ExpertMLP"].complete(attributes)
    names = ("activation", "gated", "layout", "alpha", "limit")
    active = activate(inner, **{k: full[k] for k in names}).astype(np.float32)
    outer = grouped(active, inputs["down"], inputs["down_bias"])
    (chain,) = in_kernel("Combine", {"rows": outer, "order": order, "weights": inputs["weights"]}, {})
    assert not problem(OPS["ExpertMLP"], "float32", fused, chain.astype(np.float64))


def test_the_comparison_rejects_a_broken_kernel() -> None:
    """One swapped expert, a doubled and a reversed result are all seen."""
    ids, experts = expert_ids(40, 3, 16, strangers=False), 16
    inputs = expert_inputs({}, ids, experts, "float32", "float32")
    want = expected("ExpertMLP", inputs, {"num_experts": experts})
    (good,) = in_kernel("ExpertMLP", inputs, {"num_experts": experts})
    swapped = ids.copy()
    swapped[0, 0] = (ids[0, 0] + 1) % experts
    (wrong,) = in_kernel("ExpertMLP", {**inputs, "expert_ids": swapped}, {"num_experts": experts})
    for broken in (wrong, good * 2, good[::-1], np.zeros_like(good)):
        with pytest.raises(AssertionError, match="error"):
            assert_equal("ExpertMLP", "float32", [broken], want)
