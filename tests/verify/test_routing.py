"""Routing agreement and near ties: what is excused is proven, everything else is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_export.ops.router import reference as route
from moe_export.schema import MoELayer
from moe_export.trace import LayerTrace
from moe_export.verify.routing import TokenRouting, compare_routing
from moe_export.verify.ties import make_prover

E, K, T, H = 8, 2, 40, 4


def layer(**router: Any) -> MoELayer:
    return MoELayer(
        index=0,
        name="block.0.moe",
        num_experts=E,
        top_k=K,
        hidden_size=H,
        intermediate_size=4,
        hidden="h",
        expert_ids="i",
        weights="w",
        output="o",
        logits="l",
        router={"top_k": K, "score": "softmax", "renormalize": 1, **router} if router is not None else None,
    )


def trace(
    logits: np.ndarray, bias: np.ndarray | None = None, *, keep_logits: bool = True, **router: Any
) -> LayerTrace:
    options = {"score": "softmax", "renormalize": 1, **router}
    weights, ids = route(logits, bias, top_k=K, **options)
    zeros = np.zeros((len(logits), H), np.float32)
    return LayerTrace(
        0,
        "block.0.moe",
        ids,
        weights.astype(np.float32),
        zeros,
        zeros,
        logits.astype(np.float32) if keep_logits else None,
    )


def compare(
    engine: LayerTrace, reference: LayerTrace, which: MoELayer | None = None, **options: Any
) -> TokenRouting:
    settings_ = {"near_tie": 1e-5, "weight_limit": 1e-4, **options}
    prover = make_prover(which or layer(), engine, reference, 1e-5)
    return compare_routing(engine, reference, prover, **settings_)


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((T, E)).astype(np.float32)


def replace(base: LayerTrace, **fields: Any) -> LayerTrace:
    import dataclasses

    return dataclasses.replace(base, **fields)


def test_equal_routing_agrees(logits: np.ndarray) -> None:
    r = compare(trace(logits), trace(logits))
    assert r.same.all() and r.ordered.all() and not r.unexplained.any() and r.weight_error.max() == 0


def test_order_is_told_apart_from_the_set(logits: np.ndarray) -> None:
    base = trace(logits)
    turned = replace(base, expert_ids=base.expert_ids[:, ::-1].copy(), weights=base.weights[:, ::-1].copy())
    r = compare(turned, base)
    assert r.same.all() and not r.ordered.any() and r.weight_error.max() == 0


def test_weights_are_aligned_by_expert_not_by_column(logits: np.ndarray) -> None:
    base = trace(logits)
    crossed = replace(base, expert_ids=base.expert_ids[:, ::-1].copy())
    r = compare(crossed, base)
    assert r.same.all() and r.weight_error.max() > 0.1


@pytest.mark.parametrize("factor", [1.5, 2.0, 0.0, -1.0])
def test_wrong_weights_show(logits: np.ndarray, factor: float) -> None:
    base = trace(logits)
    r = compare(replace(base, weights=base.weights * np.float32(factor)), base)
    assert r.same.all() and r.weight_error.min() >= 0.4


def test_nan_weight_is_infinitely_wrong(logits: np.ndarray) -> None:
    base = trace(logits)
    bad = base.weights.copy()
    bad[7, 1] = np.nan
    r = compare(replace(base, weights=bad), base)
    assert np.isinf(r.weight_error[7]) and np.isfinite(np.delete(r.weight_error, 7)).all()


def test_another_expert_far_from_a_tie_is_unexplained(logits: np.ndarray) -> None:
    base = trace(logits)
    ids = base.expert_ids.copy()
    ids[5, 1] = next(e for e in np.argsort(logits[5]) if e not in ids[5])
    r = compare(replace(base, expert_ids=ids), base)
    assert r.unexplained[5] and r.unexplained.sum() == 1 and not r.near_tie.any()
    assert np.isnan(r.weight_error[5])


@pytest.mark.parametrize("keep_logits", [True, False])
def test_a_proven_tie_is_counted_apart(logits: np.ndarray, keep_logits: bool) -> None:
    order = np.argsort(-logits[5])
    logits[5, order[2]] = logits[5, order[1]] - 2e-7
    other = logits.copy()
    other[5, order[2]] += 4e-7
    r = compare(trace(other), trace(logits, keep_logits=keep_logits))
    assert r.near_tie[5] and r.near_tie.sum() == 1 and not r.unexplained.any() and not r.same[5]


def test_a_tie_at_the_edge_does_not_excuse_a_third_expert(logits: np.ndarray) -> None:
    order = np.argsort(-logits[5])
    logits[5, order[2]] = logits[5, order[1]] - 2e-7
    base = trace(logits)
    ids = base.expert_ids.copy()
    ids[5] = [order[0], order[5]]
    assert compare(replace(base, expert_ids=ids), base).unexplained[5]


def test_without_logits_nothing_is_a_near_tie(logits: np.ndarray) -> None:
    order = np.argsort(-logits[5])
    logits[5, order[2]] = logits[5, order[1]] - 2e-7
    other = logits.copy()
    other[5, order[2]] += 4e-7
    r = compare(trace(other, keep_logits=False), trace(logits, keep_logits=False))
    assert r.unexplained[5] and not r.near_tie.any() and "not in the graph" in r.margin


def test_collapsed_engine_logits_excuse_nothing(logits: np.ndarray) -> None:
    """Router weights lost: every expert ties in the engine, but not in the source."""
    r = compare(trace(np.zeros_like(logits)), trace(logits, keep_logits=False))
    assert not r.near_tie.any() and r.unexplained.sum() == (~r.same).sum() > T / 2


def test_collapsed_engine_logits_of_a_biased_router_excuse_nothing(logits: np.ndarray) -> None:
    bias = np.linspace(0, 0.5, E)
    router = {"score": "sigmoid", "biased": 1}
    engine = trace(np.zeros_like(logits), bias, **router)
    reference = trace(logits, bias, keep_logits=False, **router)
    which = layer(**router, selection_bias=bias.tolist())
    assert not compare(engine, reference, which).near_tie.any()


def test_selection_rule_that_does_not_fit_is_not_used(logits: np.ndarray) -> None:
    base = trace(-logits)
    wrong = replace(base, logits=logits)
    r = compare(trace(logits), wrong)
    assert not r.near_tie.any() and "does not reproduce" in r.margin


def test_bias_needed_but_absent_means_margin_unknown(logits: np.ndarray) -> None:
    bias = np.linspace(0, 1, E)
    router = {"score": "sigmoid", "biased": 1}
    base = trace(logits, bias, **router)
    assert "selection bias" in compare(base, base, layer(**router)).margin


def _tie_at_the_edge(logits: np.ndarray, bias: np.ndarray, gap: float) -> tuple[np.ndarray, int]:
    """Move the third-ranked expert of row 5 to ``gap`` (in logits) below the second by sigmoid + bias."""
    selection = 1 / (1 + np.exp(-logits[5].astype(np.float64))) + bias
    order = np.argsort(-selection)
    target = selection[order[1]] - bias[order[2]]
    target = min(max(target, 1e-3), 1 - 1e-3)
    out = logits.astype(np.float64)
    out[5, order[2]] = np.log(target / (1 - target)) - gap
    return out, int(order[2])


def test_tie_through_sigmoid_and_selection_bias(logits: np.ndarray) -> None:
    bias = np.linspace(0, 0.1, E)
    router = {"score": "sigmoid", "biased": 1}
    near, expert = _tie_at_the_edge(logits, bias, 1e-7)
    other = near.copy()
    other[5, expert] += 3e-7
    which = layer(**router, selection_bias=bias.tolist())
    reference = replace(trace(near, bias, **router), logits=near)
    engine = replace(trace(other, bias, **router), logits=other)
    r = compare(engine, reference, which)
    assert r.near_tie[5] and not r.unexplained.any()
    plain = trace(near, None, **router)
    r = compare(plain, reference, which)
    assert r.unexplained.any(), "dropping the bias must not pass as ties"


def test_tie_between_groups(logits: np.ndarray) -> None:
    router = {"score": "softmax", "n_group": 4, "topk_group": 1}
    logits[:, :] -= 5
    logits[5] = [3.0, 1.0, -2, -2, 3.0 - 1e-7, 0.5, -2, -2]
    other = logits.copy()
    other[5, 4] += 1e-6
    r = compare(trace(other, **router), trace(logits, **router), layer(**router))
    assert not r.same[5] and r.near_tie[5]
    logits[5, 4] -= 0.5
    assert compare(trace(other, **router), trace(logits, **router), layer(**router)).unexplained[5]


def test_after_an_earlier_tie_only_moved_tokens_are_excused(logits: np.ndarray) -> None:
    base = trace(logits)
    ids = base.expert_ids.copy()
    ids[5, 1] = next(e for e in np.argsort(logits[5]) if e not in ids[5])
    broken = replace(base, expert_ids=ids)
    moved = np.zeros(T, bool)
    moved[5] = True
    assert compare(broken, base, moved=moved, tie_before=True).after_tie[5]
    assert compare(broken, base, moved=~moved, tie_before=True).unexplained[5]
    assert compare(broken, base, moved=moved, tie_before=False).unexplained[5]


def test_dropped_assignments_compare_exactly(logits: np.ndarray) -> None:
    base = trace(logits)
    ids = base.expert_ids.copy()
    ids[9, 1] = -1
    r = compare(replace(base, expert_ids=ids), base)
    assert r.dropped[9] and r.unexplained[9] and not r.near_tie.any()
    r = compare(base, replace(base, expert_ids=ids))
    assert r.dropped[9] and r.unexplained[9]
    both = replace(base, expert_ids=ids)
    again = replace(both, weights=np.where(ids < 0, 123.0, both.weights).astype(np.float32))
    assert compare(again, both).same.all() and compare(again, both).weight_error.max() == 0


def test_a_tie_excuses_few_drops_not_many(logits: np.ndarray) -> None:
    order = np.argsort(-logits[5])
    logits[5, order[2]] = logits[5, order[1]] - 2e-7
    other = logits.copy()
    other[5, order[2]] += 4e-7
    base, engine = trace(logits), trace(other)
    few = engine.expert_ids.copy()
    few[9, 1] = -1
    r = compare(replace(engine, expert_ids=few), base)
    assert r.near_tie[5] and r.after_tie[9] and not r.unexplained.any()
    many = engine.expert_ids.copy()
    many[9:29, 1] = -1
    assert compare(replace(engine, expert_ids=many), base).unexplained.sum() == 20


def test_shapes_must_fit(logits: np.ndarray) -> None:
    base = trace(logits)
    prover = make_prover(layer(), base, base, 1e-5)
    short = replace(base, expert_ids=base.expert_ids[:, :1], weights=base.weights[:, :1])
    with pytest.raises(ValueError, match="shape"):
        compare_routing(short, base, prover, near_tie=1e-5, weight_limit=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), noise=st.sampled_from([0.0, 1e-7, 1e-6]), groups=st.sampled_from([1, 2, 4])
)
def test_noise_within_the_bound_never_is_unexplained(seed: int, noise: float, groups: int) -> None:
    """Noise below the bound is always explained, with groups too; a shuffled router never is."""
    random = np.random.default_rng(seed)
    router = {"score": "softmax", "n_group": groups, "topk_group": max(1, groups // 2)}
    base = np.round(random.standard_normal((30, E)), 1)
    base[:, 0] += 2.0
    noisy = base + noise * random.uniform(-1, 1, base.shape)
    reference = replace(trace(base, **router), logits=base)
    engine = replace(trace(noisy, **router), logits=noisy)
    r = compare(engine, reference, layer(**router))
    assert not r.unexplained.any()
    wrong = replace(trace(random.permuted(base, axis=1), **router), logits=base)
    assert (compare(wrong, reference, layer(**router)).unexplained.sum()) > 5
