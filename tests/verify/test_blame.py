"""Given a layer that went wrong, the right part of it is blamed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_export.ops.router import reference as route
from moe_export.schema import MoELayer
from moe_export.trace import LayerTrace, TracedRun
from moe_export.verify.blame import ExpertEvidence, blame_experts, blame_router
from moe_export.verify.layers import LayerComparison, compare_layers
from moe_export.verify.tolerance import default_tolerances

E, K, T, H = 8, 2, 120, 6
RANDOM = np.random.default_rng(7)
LOGITS = RANDOM.standard_normal((T, E)).astype(np.float32)
BIAS = np.linspace(-0.4, 0.4, E)
HIDDEN = RANDOM.standard_normal((T, H)).astype(np.float32)


def compared(
    engine: dict[str, Any], reference: dict[str, Any], *, reference_logits: bool = True
) -> LayerComparison:
    """One layer compared, both sides routed by the Router op's reference with these options."""
    layer = MoELayer(0, "mlp", E, K, H, 4, "h", "i", "w", "o", "l", router={"top_k": K, "score": "softmax"})

    def trace(options: dict[str, Any], keep: bool) -> LayerTrace:
        logits = options.pop("logits", LOGITS)
        bias = options.pop("bias", None)
        weights, ids = route(logits, bias, top_k=K, **options)
        return LayerTrace(0, "mlp", ids, weights.astype(np.float32), HIDDEN, HIDDEN, logits if keep else None)

    runs = [
        TracedRun({}, (trace(dict(engine), True),)),
        TracedRun({}, (trace(dict(reference), reference_logits),)),
    ]
    comparisons, _ = compare_layers(
        runs[0],
        runs[1],
        [layer],
        [np.ones((4, T // 4), bool)],
        default_tolerances("float32", []),
        forced=False,
    )
    return comparisons[0]


def words(comparison: LayerComparison) -> tuple[str, str]:
    fair = np.ones(T, bool)
    logits_bad = comparison.logits > 1e-4 if comparison.logits is not None else np.zeros(T, bool)
    errors = np.nan_to_num(comparison.routing.weight_error, nan=0.0)
    blame = blame_router(comparison, fair, comparison.routing.unexplained, errors > 1e-4, logits_bad)
    assert blame is not None and blame.tokens.any()
    return blame.kind, blame.words


RENORMALISED = {"renormalize": 1}
ROUTERS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "selection bias dropped": (
        {"score": "sigmoid"},
        {"score": "sigmoid", "bias": BIAS, "biased": 1},
        "wrong router",
        "selection bias or a group",
    ),
    "group limit dropped": (
        {},
        {"n_group": 4, "topk_group": 1},
        "wrong router",
        "selection bias or a group limit",
    ),
    "router bias": (
        {"logits": LOGITS + BIAS.astype(np.float32)},
        {},
        "wrong router",
        "router's bias is missing or wrong",
    ),
    "router weights": (
        {"logits": np.roll(LOGITS, 1, axis=1)},
        {},
        "wrong router",
        "weights or bias are wrong",
    ),
    "another selection": (
        {"bias": -3 * BIAS, "biased": 1, **RENORMALISED},
        RENORMALISED,
        "wrong router",
        "selection is wrong",
    ),
    "scaled": ({"scale": 2.5, **RENORMALISED}, RENORMALISED, "wrong router weights", "2.5 times"),
    "not renormalised": ({}, RENORMALISED, "wrong router weights", "not renormalised"),
    "renormalised": (RENORMALISED, {}, "wrong router weights", "are renormalised although"),
    "score function": (
        {"score": "sigmoid", **RENORMALISED},
        RENORMALISED,
        "wrong router weights",
        "another proportion",
    ),
    "capacity ignored": ({}, {"capacity": 20}, "dropped token", "keeps assignments"),
    "capacity too small": ({"capacity": 20}, {}, "dropped token", "drops assignments"),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_router_mistakes(name: str) -> None:
    engine, reference, kind, expected = ROUTERS[name]
    got = words(compared(engine, reference))
    assert got[0] == kind and expected in got[1], got


def test_without_reference_logits_the_weights_tell() -> None:
    kind, text = words(compared({"logits": np.roll(LOGITS, 1, axis=1)}, {}, reference_logits=False))
    assert kind == "wrong router" and "no closer cause" in text
    noisy = LOGITS + 0.1 * RANDOM.standard_normal((T, E)).astype(np.float32)
    kind, text = words(compared({"logits": noisy}, {}, reference_logits=False))
    assert kind == "wrong router" and "probably the router's logits" in text
    biased = {"score": "sigmoid", "bias": BIAS, "biased": 1}
    kind, text = words(compared({"score": "sigmoid"}, biased, reference_logits=False))
    assert kind == "wrong router" and "probably the selection" in text


def test_right_routers_are_not_blamed() -> None:
    nothing = np.zeros(T, bool)
    same = compared(RENORMALISED, RENORMALISED)
    assert blame_router(same, ~nothing, same.routing.unexplained, nothing, nothing) is None


def evidence(guilty: set[int], seed: int, tokens: int = 200) -> ExpertEvidence:
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((tokens, E)), axis=1)[:, :K].astype(np.int32)
    weights = random.uniform(0.2, 1.0, (tokens, K))
    bad = np.isin(ids, list(guilty)).any(axis=1)
    shown = random.standard_normal((int(bad.sum()), H))
    return ExpertEvidence(ids, weights, bad, shown + 1, shown)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, E - 1), min_size=1, max_size=4), st.integers(0, 1000))
def test_exactly_the_guilty_experts_are_named(guilty: set[int], seed: int) -> None:
    experts, text = blame_experts([evidence(guilty, seed)], 1e-4)
    assert set(experts) == guilty and "where they use expert" in text


def test_evidence_of_another_run_acquits() -> None:
    one = evidence({2}, 0, tokens=1)
    one = ExpertEvidence(
        np.array([[2, 5]], np.int32), np.array([[0.5, 0.5]]), np.array([True]), *[np.ones((1, H))] * 2
    )
    alone, text = blame_experts([one], 1e-4)
    assert alone != (2,) or "may be wrong too" in text
    other = ExpertEvidence(
        np.array([[5, 1]], np.int32),
        np.array([[0.5, 0.5]]),
        np.array([False]),
        np.zeros((0, H)),
        np.zeros((0, H)),
    )
    assert blame_experts([one, other], 1e-4)[0] == (2,)


def test_an_expert_without_weight_is_not_acquitted() -> None:
    parts = ExpertEvidence(
        np.array([[2, 5], [2, 4], [4, 5]], np.int32),
        np.array([[0.5, 0.5], [1e-9, 1.0], [0.5, 0.5]]),
        np.array([True, False, False]),
        np.ones((1, H)),
        np.zeros((1, H)),
    )
    assert blame_experts([parts], 1e-4)[0] == (2,)


def test_no_expert_explains_it() -> None:
    base = evidence({2}, 0)
    bad = base.bad.copy()
    bad[np.flatnonzero(~bad)[:3]] = True
    shown = np.ones((int(bad.sum()), H))
    experts, text = blame_experts(
        [ExpertEvidence(base.expert_ids, base.weights, bad, shown, 2 * shown)], 1e-4
    )
    assert experts == () and "combine" in text and "0.5 times" in text


def test_every_token_wrong() -> None:
    base = evidence(set(range(E)), 0)
    assert "every token is wrong" in blame_experts([base], 1e-4)[1]
