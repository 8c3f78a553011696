"""Random shapes, ids and attributes: the kernels and the float64 references say the same, or both refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_export.ops import OPS
from moe_export.ops.contract import FLOAT_TYPES
from moe_export.ops.expert_mlp import ACTIVATIONS, LAYOUTS
from moe_export.ops.router import GROUP_MASKS, GROUP_SCORES, SCORES
from tests.ops.one_op import NUMPY, assert_equal, expected

from .kernels import in_kernel

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
INT32 = st.sampled_from([-(2**31), -2, -1, 0, 1, 5, 2**31 - 1])


def floats(rng: np.random.Generator, dtype: str, *shape: int, scale: float = 1.0) -> Any:
    return (rng.standard_normal(shape) * scale).astype(np.float32).astype(NUMPY[dtype])


@st.composite
def ids_and_experts(draw: st.DrawFn) -> tuple[Any, int, np.random.Generator]:
    tokens, top_k = draw(st.integers(0, 40)), draw(st.integers(1, 8))
    experts = draw(st.integers(1, 33))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = rng.integers(-2, experts + 2, (tokens, top_k)).astype(np.int32)
    for _ in range(draw(st.integers(0, 3)) if ids.size else 0):
        ids.flat[draw(st.integers(0, ids.size - 1))] = draw(INT32)
    return ids, experts, rng


@SETTINGS
@given(ids_and_experts(), st.sampled_from(FLOAT_TYPES), st.integers(1, 70))
def test_dispatch_and_combine(case: Any, dtype: str, hidden: int) -> None:
    ids, experts, rng = case
    inputs: dict[str, Any] = {"expert_ids": ids}
    order, offsets, tokens = in_kernel("Dispatch", inputs, {"num_experts": experts})
    assert_equal(
        "Dispatch", "int64", [order, offsets, tokens], expected("Dispatch", inputs, {"num_experts": experts})
    )
    assert np.array_equal(np.sort(order), np.arange(ids.size))
    inputs = {
        "rows": floats(rng, dtype, ids.size, hidden),
        "order": order,
        "weights": floats(rng, "float32", *ids.shape),
    }
    assert_equal("Combine", dtype, in_kernel("Combine", inputs, {}), expected("Combine", inputs, {}))


@SETTINGS
@given(
    ids_and_experts(),
    st.sampled_from(FLOAT_TYPES),
    st.sampled_from(FLOAT_TYPES),
    st.integers(1, 70),
    st.integers(1, 140),
    st.integers(0, 1),
)
def test_grouped_matmul(
    case: Any, dtype: str, weight_dtype: str, inner: int, columns: int, transposed: int
) -> None:
    ids, experts, rng = case
    _, offsets, _ = OPS["Dispatch"].reference(ids, experts)
    shape = (experts, inner, columns) if transposed else (experts, columns, inner)
    inputs = {
        "rows": floats(rng, dtype, ids.size, inner),
        "weight": floats(rng, weight_dtype, *shape, scale=inner**-0.5),
        "offsets": offsets,
    }
    got = in_kernel("GroupedMatMul", inputs, {"transposed": transposed})
    assert_equal("GroupedMatMul", dtype, got, expected("GroupedMatMul", inputs, {"transposed": transposed}))


@st.composite
def routers(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    n_group, per_group = draw(st.integers(1, 5)), draw(st.integers(2, 12))
    experts = n_group * per_group
    topk_group = draw(st.integers(1, n_group))
    attributes = {
        "top_k": draw(st.integers(1, min(9, topk_group * per_group))),
        "score": draw(st.sampled_from(SCORES)),
        "renormalize": draw(st.integers(0, 1)),
        "epsilon": draw(st.sampled_from([0.0, 1e-20, 1e-6])),
        "scale": draw(st.sampled_from([1.0, 2.5, 0.5])),
        "n_group": n_group,
        "topk_group": topk_group,
        "group_score": draw(st.sampled_from(GROUP_SCORES)),
        "group_mask": draw(st.sampled_from(GROUP_MASKS)),
        "capacity": draw(st.sampled_from([0, 0, 1, 3])),
        "biased": draw(st.integers(0, 1)),
    }
    tokens = draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Values whose order survives the rounding of scores to float32, with many exact ties among them.
    logits = rng.integers(-12, 13, (tokens, experts)) / 8.0
    inputs: dict[str, Any] = {
        "logits": logits.astype(NUMPY[draw(st.sampled_from(FLOAT_TYPES))]),
        "selection_bias": None,
        "sequence_length": None,
    }
    if attributes["biased"]:
        bias = (rng.integers(-3, 4, experts) / 4.0).astype(np.float32)
        inputs["selection_bias"] = bias.astype(NUMPY[draw(st.sampled_from(FLOAT_TYPES))])
    if attributes["capacity"]:
        inputs["sequence_length"] = np.array(draw(st.integers(1, 20)), np.int64)
    return attributes, inputs


@SETTINGS
@given(routers())
def test_router(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    attributes, inputs = case
    want_weights, want_ids = expected("Router", inputs, attributes)
    weights, ids = in_kernel("Router", inputs, attributes)
    plain = {k: v for k, v in attributes.items() if k not in ("capacity", "layer")}
    if attributes["capacity"] == 0 and not np.array_equal(ids, want_ids):
        # Two sums may be equal in float32 and differ in float64: then the lower id wins here.
        from moe_export.ops.router import scores_and_selection

        _, selection = scores_and_selection(inputs["logits"], inputs["selection_bias"], **plain)
        got = np.take_along_axis(selection, ids.astype(np.int64), 1)
        want = np.take_along_axis(selection, want_ids.astype(np.int64), 1)
        close = np.isclose(got, want, rtol=0, atol=2e-7) | (got == want)
        assert close.all(), f"chosen {got[~close]}, expected {want[~close]}"
        return
    if attributes["capacity"] == 0 or np.array_equal(ids, want_ids):
        assert_equal("Router", "float32", [weights, ids], [want_weights, want_ids])
    else:
        runs = range(0, len(ids), int(inputs["sequence_length"]))
        for begin in runs:
            part = ids[begin : begin + int(inputs["sequence_length"])]
            counts = np.bincount(part[part >= 0], minlength=1)
            assert counts.max() <= attributes["capacity"]
        assert not weights[ids < 0].any()


@SETTINGS
@given(
    ids_and_experts(),
    st.sampled_from(FLOAT_TYPES),
    st.sampled_from(FLOAT_TYPES),
    st.sampled_from(FLOAT_TYPES),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(LAYOUTS),
    st.integers(0, 1),
    st.integers(0, 1),
    st.integers(0, 1),
)
def test_expert_mlp(
    case: Any,
    dtype: str,
    weight_dtype: str,
    bias_dtype: str,
    hidden: int,
    inner: int,
    activation: str,
    layout: str,
    gated: int,
    transposed: int,
    biased: int,
) -> None:
    ids, experts, rng = case
    gated = 1 if activation == "clamped_swiglu" else gated
    wide = inner * (1 + gated)
    up, down = (experts, wide, hidden), (experts, hidden, inner)
    if transposed:
        up, down = (experts, hidden, wide), (experts, inner, hidden)
    inputs = {
        "hidden": floats(rng, dtype, len(ids), hidden),
        "expert_ids": ids,
        "weights": np.abs(floats(rng, "float32", *ids.shape)) / ids.shape[1],
        "up": floats(rng, weight_dtype, *up, scale=hidden**-0.5),
        "down": floats(rng, weight_dtype, *down, scale=inner**-0.5),
        "up_bias": floats(rng, bias_dtype, experts, wide) if biased else None,
        "down_bias": floats(rng, bias_dtype, experts, hidden) if biased else None,
    }
    attributes = {
        "num_experts": experts,
        "activation": activation,
        "layout": layout,
        "gated": gated,
        "transposed": transposed,
        "biased": biased,
    }
    got = in_kernel("ExpertMLP", inputs, attributes)
    assert_equal("ExpertMLP", dtype, got, expected("ExpertMLP", inputs, attributes))
