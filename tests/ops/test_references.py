"""What must hold of each op whatever its inputs are, on the references and on the bodies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_export.ops import OPS
from moe_export.ops.expert_mlp import activate
from moe_export.ops.packing import unpack_down, unpack_up

from .cases import EXPERTS, expert_inputs, randoms
from .one_op import in_onnxruntime, problem

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def routings(draw: st.DrawFn) -> tuple[NDArray[np.int32], int]:
    """Expert ids [T, K], dropped and foreign ones too, and E."""
    experts, tokens, top_k = (draw(st.integers(low, high)) for low, high in ((1, 9), (0, 12), (1, 4)))
    flat = draw(st.lists(st.integers(-2, experts + 1), min_size=tokens * top_k, max_size=tokens * top_k))
    return np.asarray(flat, np.int32).reshape(tokens, top_k), experts


def by_reference(name: str, inputs: dict[str, Any], attributes: dict[str, Any]) -> list[NDArray[Any]]:
    out = OPS[name].reference(**inputs, **OPS[name].complete(attributes))
    return list(out) if isinstance(out, tuple) else [out]


RUNS = pytest.mark.parametrize("run", [by_reference, in_onnxruntime])


@RUNS
@QUICK
@given(routing=routings())
def test_dispatch_sorts_stably(run: Any, routing: tuple[NDArray[np.int32], int]) -> None:
    ids, experts = routing
    order, offsets, tokens = run("Dispatch", {"expert_ids": ids}, {"num_experts": experts})
    flat = ids.reshape(-1)
    assert sorted(order.tolist()) == list(range(flat.size)), "order is a permutation"
    assert (np.diff(offsets) >= 0).all(), "offsets rise"
    assert len(offsets) == experts + 1
    assert offsets[0] == (flat < 0).sum()
    assert flat.size - offsets[-1] == (flat >= experts).sum()
    for expert in range(experts):
        own = order[offsets[expert] : offsets[expert + 1]]
        assert own.tolist() == np.flatnonzero(flat == expert).tolist(), "its assignments, in token order"
    assert tokens.tolist() == (order // ids.shape[1]).tolist()


@RUNS
@QUICK
@given(routing=routings())
def test_combine_undoes_dispatch(run: Any, routing: tuple[NDArray[np.int32], int]) -> None:
    ids, experts = routing
    order, _, _ = OPS["Dispatch"].reference(ids, experts)
    values = np.arange(ids.size * 2, dtype=np.float32).reshape(ids.size, 2)
    inputs = {"rows": values[order], "order": order, "weights": np.ones(ids.shape, np.float32)}
    (out,) = run("Combine", inputs, {})
    assert np.array_equal(out, values.reshape(*ids.shape, 2).sum(axis=1))


@RUNS
@QUICK
@given(routing=routings())
def test_grouped_matmul_writes_nothing_outside(run: Any, routing: tuple[NDArray[np.int32], int]) -> None:
    ids, experts = routing
    order, offsets, _ = OPS["Dispatch"].reference(ids, experts)
    weight = np.ones((experts, 3, 2), np.float32) * (1 + np.arange(experts, dtype=np.float32))[:, None, None]
    inputs = {"rows": np.ones((ids.size, 2), np.float32), "weight": weight, "offsets": offsets}
    (out,) = run("GroupedMatMul", inputs, {})
    owner = ids.reshape(-1)[order]
    ours = (owner >= 0) & (owner < experts)
    assert np.array_equal(out, np.repeat(np.where(ours, 2.0 * (owner + 1), 0.0)[:, None], 3, axis=1))


@st.composite
def router_cases(draw: st.DrawFn) -> tuple[NDArray[np.float32], dict[str, Any]]:
    n_group = draw(st.sampled_from([1, 2, 4]))
    experts = n_group * draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, topk_group * experts // n_group))
    tokens = draw(st.integers(0, 6))
    seed = draw(st.integers(0, 10_000))
    attributes = {
        "top_k": top_k,
        "score": draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"])),
        "renormalize": draw(st.integers(0, 1)),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "n_group": n_group,
        "topk_group": topk_group,
        "group_score": draw(st.sampled_from(["max", "top2_sum"])),
    }
    return np.random.default_rng(seed).standard_normal((tokens, experts)).astype(np.float32), attributes


@RUNS
@settings(QUICK, max_examples=40)
@given(case=router_cases())
def test_router_invariants(run: Any, case: tuple[NDArray[np.float32], dict[str, Any]]) -> None:
    logits, attributes = case
    weights, ids = run("Router", {"logits": logits}, attributes)
    top_k, experts = attributes["top_k"], logits.shape[1]
    assert weights.shape == ids.shape == (len(logits), top_k)
    assert all(len(set(row)) == top_k and min(row) >= 0 and max(row) < experts for row in ids.tolist())
    if attributes["renormalize"] or attributes["score"] == "softmax_after_topk":
        assert np.allclose(weights.sum(axis=1), attributes["scale"], rtol=1e-6)
    assert (weights >= 0).all()
    groups = ids // (experts // attributes["n_group"])
    assert all(len(set(row)) <= attributes["topk_group"] for row in groups.tolist())


@RUNS
@QUICK
@given(
    capacity=st.integers(1, 3), length=st.integers(1, 4), top_k=st.integers(1, 3), seed=st.integers(0, 999)
)
def test_router_drops_exactly_what_is_beyond_the_capacity(
    run: Any, capacity: int, length: int, top_k: int, seed: int
) -> None:
    logits = np.random.default_rng(seed).standard_normal((3 * length, 3)).astype(np.float32)
    plain_weights, plain = by_reference("Router", {"logits": logits}, {"top_k": top_k})
    weights, ids = run(
        "Router",
        {"logits": logits, "sequence_length": np.array(length)},
        {"top_k": top_k, "capacity": capacity},
    )
    for begin in range(0, len(logits), length):
        taken = {e: 0 for e in range(3)}
        for t in range(begin, begin + length):
            for k in range(top_k):
                expert = int(plain[t, k])
                taken[expert] += 1
                kept = taken[expert] <= capacity
                assert ids[t, k] == (expert if kept else -1)
                assert np.isclose(weights[t, k], plain_weights[t, k] if kept else 0.0, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", EXPERTS)
def test_expert_mlp_is_the_chain_of_its_parts(variant: str) -> None:
    attributes = {"num_experts": 4, **EXPERTS[variant]}
    ids = np.array([[0, 3], [2, -1], [4, 1], [2, 0]], np.int32)
    inputs = expert_inputs(EXPERTS[variant], ids, 4, "float32", "float32")
    (got,) = by_reference("ExpertMLP", inputs, attributes)
    want = np.zeros_like(got)
    transposed = attributes.get("transposed", 0)
    if attributes.get("packed"):
        gated = bool(attributes.get("gated", 1))
        inputs["up"] = unpack_up(inputs["up"], inputs["down"].shape[2], gated=gated)
        inputs["down"] = unpack_down(inputs["down"], inputs["hidden"].shape[1])
    for (token, k), expert in np.ndenumerate(ids):
        if not 0 <= expert < 4:
            continue
        up, down = (inputs[n][expert].astype(np.float64) for n in ("up", "down"))
        up, down = (up, down) if transposed else (up.T, down.T)
        inner = inputs["hidden"][token].astype(np.float64) @ up
        if inputs["up_bias"] is not None:
            inner = inner + inputs["up_bias"][expert]
        full = OPS["ExpertMLP"].complete(attributes)
        chosen = {n: full[n] for n in ("activation", "gated", "layout", "alpha", "limit")}
        out = activate(inner[None], **chosen)[0] @ down
        if inputs["down_bias"] is not None:
            out = out + inputs["down_bias"][expert]
        want[token] += inputs["weights"][token, k] * out
    assert np.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_are_those_of_pytorch(name: str) -> None:
    import torch

    from moe_export.models.adapters import MoEBlockSpec

    x = torch.linspace(-6, 6, 50, dtype=torch.float64)[:, None]
    spec = MoEBlockSpec(
        "experts", route=lambda b, h: (h, h), up_proj="u", down_proj="d", top_k=1, activation=name
    )
    got = activate(x.numpy(), activation=name, gated=0, layout="concatenated")
    assert np.allclose(got, spec.activate(x).numpy(), atol=1e-12)


def test_clamped_swiglu_is_that_of_gpt_oss() -> None:
    import torch
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=4, intermediate_size=4, num_local_experts=2)
    experts = GptOssExperts(config)
    rows = torch.linspace(-20, 20, 24, dtype=torch.float64).reshape(3, 8)
    want = experts._apply_gate(rows).numpy()
    got = activate(
        rows.numpy(),
        activation="clamped_swiglu",
        gated=1,
        layout="interleaved",
        alpha=experts.alpha,
        limit=experts.limit,
    )
    assert np.allclose(got, want, atol=1e-12)


def broken(name: str) -> dict[str, Any]:
    """Results of GroupedMatMul, Combine or ExpertMLP that are wrong, each in its own way."""
    ids = np.array([[0, 1], [1, 2], [2, 0], [3, 1], [0, 3]], np.int32)
    inputs = expert_inputs({}, ids, 4, "float32", "float32")
    swapped = dict(inputs, up=inputs["up"][[1, 0, 2, 3]], down=inputs["down"][[1, 0, 2, 3]])
    dropped = dict(inputs, expert_ids=np.where(np.arange(5)[:, None] == 2, -1, ids).astype(np.int32))
    run = OPS["ExpertMLP"].reference
    right = run(**inputs, num_experts=4)
    return {
        "right": right,
        "doubled": right * 2,
        "zeroed": right * 0,
        "reversed": right[::-1],
        "scaled by a thousandth": right * 1.001,
        "experts swapped": run(**swapped, num_experts=4),
        "one token dropped": run(**dropped, num_experts=4),
        "weights swapped": run(**dict(inputs, weights=inputs["weights"][:, ::-1]), num_experts=4),
        "one value": np.where(np.arange(right.size).reshape(right.shape) == 7, right + 1e-4, right),
        "not finite": np.where(np.arange(right.size).reshape(right.shape) == 7, np.nan, right),
        "one row short": right[:-1],
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "doubled",
        "zeroed",
        "reversed",
        "scaled by a thousandth",
        "experts swapped",
        "one token dropped",
        "weights swapped",
        "one value",
        "not finite",
        "one row short",
    ],
)
def test_the_comparison_rejects_broken_results(name: str) -> None:
    op = OPS["ExpertMLP"]
    assert problem(op, "float32", broken("right").astype(np.float32), broken("right")) == ""
    assert problem(op, "float32", broken(name).astype(np.float32), broken("right")) != ""


def test_the_comparison_rejects_a_wrong_expert() -> None:
    ids = np.array([[0, 1], [2, 3]], np.int32)
    assert problem(OPS["Router"], "float32", ids, ids) == ""
    found = problem(OPS["Router"], "float32", ids[:, ::-1], ids)
    assert found == "4 integers differ, first at [0, 0]"


def test_max_and_rms_are_both_checked() -> None:
    op = OPS["ExpertMLP"]
    bound = op.tolerance["float32"]
    everywhere = np.full((50, 4), bound.rms * 1.5)
    assert "RMS" in problem(op, "float32", everywhere, np.zeros((50, 4)))
    once = randoms("float32", 50, 4) * 0
    once[3, 1] = bound.max * 1.5
    assert "max error" in problem(op, "float32", once, np.zeros((50, 4)))
    assert "[3, 1]" in problem(op, "float32", once, np.zeros((50, 4)))
