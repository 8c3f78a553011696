"""What only looks like a router is left alone, and why: the numbers that tell it from one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_export.passes.router_proof import hard_logits

from .moe_graphs import (
    EXPERTS,
    inlined_router,
    one_layer,
    run,
    tokens,
)
from .router_texts import BIAS, PLAIN, attach, routing, scalar

REVERSED = np.arange(EXPERTS, dtype=np.int64)[::-1].copy()
LOOK_ALIKES: dict[str, tuple[str, dict[str, Any]]] = {
    "scores above 0.9999 count as 1": (
        PLAIN + "high = Greater (best, limit)\n weights = Where (high, one, best)",
        {"limit": scalar(0.9999), "one": scalar(1.0)},
    ),
    "weights below 1e-4 dropped": (
        PLAIN + "low = Less (best, limit)\n weights = Where (low, none, best)",
        {"limit": scalar(1e-4), "none": scalar(0.0)},
    ),
    "an expert of more than 0.99995 takes all": (
        PLAIN
        + """top = ReduceMax <keepdims = 1> (best, last)
        sure = Greater (top, limit)
        first = Equal (best, top)
        hard = Cast <to = 1> (first)
        weights = Where (sure, hard, best)""",
        {"limit": scalar(0.99995)},
    ),
    "renormalised unless the sum is tiny": (
        """scores = Sigmoid (logits)
        best, chosen = TopK <axis = -1> (scores, k)
        sum = ReduceSum <keepdims = 1> (best, last)
        enough = Greater (sum, limit)
        safe = Where (enough, sum, one)
        weights = Div (best, safe)""",
        {"limit": scalar(1e-6), "one": scalar(1.0)},
    ),
    "sum clamped from below": (
        """scores = Sigmoid (logits)
        best, chosen = TopK <axis = -1> (scores, k)
        sum = ReduceSum <keepdims = 1> (best, last)
        safe = Max (sum, limit)
        weights = Div (best, safe)""",
        {"limit": scalar(1e-7)},
    ),
    "bias in the weights too": (
        "scores = Sigmoid (logits)\n biased = Add (scores, bias)\n weights, chosen = TopK <axis = -1> "
        "(biased, k)",
        {"bias": np.zeros(EXPERTS, np.float32)},
    ),
    "large bias clipped": (
        """scores = Sigmoid (logits)
        kept = Clip (bias, minus, plus)
        biased = Add (scores, kept)
        best, chosen = TopK <axis = -1> (biased, k)
        weights = GatherElements <axis = 1> (scores, chosen)""",
        {"bias": BIAS * 0.1, "minus": scalar(-50), "plus": scalar(50)},
    ),
    "ties go to the higher expert": (
        """scores = Softmax <axis = -1> (logits)
        backwards = Gather <axis = 1> (scores, reversed)
        weights, places = TopK <axis = -1> (backwards, k)
        chosen = Gather <axis = 0> (reversed, places)""",
        {"reversed": REVERSED},
    ),
    "at most 200 tokens routed": (
        PLAIN
        + """size = Shape <start = 0, end = 1> (logits)
        many = Greater (size, limit)
        weights = Where (many, none, best)""",
        {"limit": np.array([200], np.int64), "none": scalar(0.0)},
    ),
    "first token routed apart": (
        PLAIN
        + """size = Shape <start = 0, end = 1> (logits)
        zero = Constant <value_int = 0> ()
        step = Constant <value_int = 1> ()
        count = Squeeze (size)
        place = Range (zero, count, step)
        first = Equal (place, zero)
        column = Unsqueeze (first, last)
        weights = Where (column, one, best)""",
        {"one": scalar(1.0)},
    ),
    "softmax over the tokens": (
        "scores = Softmax <axis = 0> (logits)\n weights, chosen = TopK <axis = -1> (scores, k)",
        {},
    ),
    "relative threshold (sparsemixer)": (
        PLAIN
        + """top = ReduceMax <keepdims = 1> (logits, last)
        gap = Sub (top, logits)
        size = Abs (logits)
        scale = Max (size, top)
        part = Div (gap, scale)
        far = Greater (part, limit)
        picked = GatherElements <axis = 1> (far, chosen)
        weights = Where (picked, none, best)""",
        {"limit": scalar(0.2), "none": scalar(0.0)},
    ),
    "a number per expert on the scores": (
        PLAIN + "own = Gather <axis = 0> (gain, chosen)\n weights = Mul (own, best)",
        {"gain": np.linspace(0.5, 1.5, EXPERTS, dtype=np.float32)},
    ),
}
ONLY_EXTREMES = (
    "scores above 0.9999 count as 1",
    "weights below 1e-4 dropped",
    "an expert of more than 0.99995 takes all",
    "renormalised unless the sum is tiny",
    "sum clamped from below",
    "large bias clipped",
    "ties go to the higher expert",
    "at most 200 tokens routed",
)


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_stays_plain_nodes(name: str) -> None:
    router, more = LOOK_ALIKES[name]
    context, before = attach(router, more)
    layer = context.layers[0]
    assert layer.router is None, f"recognised as {layer.router}"
    assert layer.router_note and layer.logits is None
    assert context.decisions[0].choice == "router as plain nodes"
    assert context.decisions[0].reason == layer.router_note
    hidden = tokens(17)
    assert np.array_equal(run(context.model, hidden)[0], run(before, hidden)[0]), "nothing was changed"


@pytest.mark.parametrize("name", ONLY_EXTREMES)
def test_those_look_alikes_do_match_on_random_inputs(name: str) -> None:
    router, more = LOOK_ALIKES[name]
    plain = {
        "renormalised unless the sum is tiny": {"score": "sigmoid", "renormalize": 1},
        "sum clamped from below": {"score": "sigmoid", "renormalize": 1},
        "large bias clipped": {"score": "sigmoid", "biased": 1},
    }.get(name, {"score": "softmax"})
    honest = one_layer(inlined_router(**plain), more={"selection_bias": BIAS * 0.1})
    for count in (5, 40):
        ids, weights = routing(one_layer(router, more=more), tokens(count, scale=0.3))
        want_ids, want = routing(honest, tokens(count, scale=0.3))
        assert np.array_equal(ids, want_ids) and np.allclose(weights, want, atol=1e-6)


def test_hard_logits_hold_what_they_promise() -> None:
    cases = hard_logits(8, "float32", [200.0, 0.25])
    together = np.concatenate([c.ravel() for c in cases])
    assert np.isneginf(together).any() is np.False_, "with 8 experts none is masked"
    assert np.isneginf(np.concatenate([c.ravel() for c in hard_logits(32, "float32")])).any()
    assert max(len(c) for c in cases) == 208
    assert any((c == c[:, :1]).all() for c in cases), "ties of all"
    assert np.abs(together).max() > 1e29
    for number in (200.0, 0.25):
        assert any(
            (c > number).any() and (c < number).any() and np.abs(c - number).min() < 0.05 * number
            for c in cases
        )
    half = np.concatenate([c.ravel() for c in hard_logits(16, "float16", [1e-20, 65504.0])])
    assert half.dtype == np.float16 and not np.isnan(half).any() and not np.isposinf(half).any()
