"""GroupedMatMul as one MatMul per expert, or as the Loop of its body: equal, and the choice is reported."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from moe_export.backends.onnxruntime.plugin import cpu_plugin_path
from moe_export.errors import UsageError
from moe_export.passes import unroll_experts
from moe_export.passes.base import PassContext
from moe_export.passes.unroll_experts import UnrollExperts
from moe_export.passes.unrolled_matmul import Unroller

from .moe_graphs import (
    EXPERTS,
    HIDDEN,
    INNER,
    SOFTMAX_RENORMALISED,
    TOP_K,
    context_of,
    layer_text,
    layer_weights,
    model_of,
    one_layer,
    run,
    tokens,
)

DROPPING = """
    scores = Softmax <axis = -1> (logits)
    best, places = TopK <axis = -1> (scores, k)
    weak = Less (best, limit)
    weights = Where (weak, none, best)
    chosen = Where (weak, dropped, places)
"""
DROPPING_VALUES: dict[str, Any] = {
    "limit": np.array(0.25, np.float32),
    "none": np.array(0.0, np.float32),
    "dropped": np.array(-1, np.int64),
}
FOREIGN = DROPPING.replace("dropped", "foreign")
FOREIGN_VALUES = {**DROPPING_VALUES, "foreign": np.array(EXPERTS + 3, np.int64)}


def lowered(context: PassContext, choice: str) -> PassContext:
    """The same model lowered by force."""
    new = PassContext(
        context.model.clone(),
        context.io,
        context.layers,
        context.dtype,
        context.opset,
        {"expert_lowering": choice},
    )
    UnrollExperts().apply(new)
    return new


def count(context: PassContext, op: str) -> int:
    return sum(n.op_type == op for n in context.model.graph.all_nodes())


CASES: dict[str, dict[str, Any]] = {
    "plain": {"router": SOFTMAX_RENORMALISED},
    "transposed": {"router": SOFTMAX_RENORMALISED, "transposed": 1},
    "drops allowed, none happens": {"router": SOFTMAX_RENORMALISED, "drops": 1},
    "drops": {"router": DROPPING, "more": DROPPING_VALUES, "drops": 1},
    "drops, transposed": {"router": DROPPING, "more": DROPPING_VALUES, "drops": 1, "transposed": 1},
    "experts of another rank": {"router": FOREIGN, "more": FOREIGN_VALUES, "drops": 1},
    "float16": {
        "router": "wide = Cast <to = 1> (logits)\n" + SOFTMAX_RENORMALISED.replace("(logits)", "(wide)"),
        "dtype": "float16",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_both_forms_are_equal(name: str) -> None:
    case = dict(CASES[name])
    router = case.pop("router")
    context = one_layer(router, **case)
    dtype = case.get("dtype", "float32")
    unrolled, loop = lowered(context, "unrolled"), lowered(context, "loop")
    assert count(unrolled, "GroupedMatMul") == 0 and count(unrolled, "MatMul") == 1 + 2 * EXPERTS
    assert count(loop, "GroupedMatMul") == 2 and count(loop, "MatMul") == 1
    tolerance = 2e-3 if dtype == "float16" else 1e-6
    dropped = 0
    for number in (0, 1, 2, 40):
        hidden = tokens(number, dtype)
        outs = [run(m, hidden)[0] for m in (context.model, unrolled.model, loop.model)]
        for out in outs[1:]:
            assert out.shape == (number, HIDDEN) and out.dtype == outs[0].dtype
            assert np.abs(out.astype(np.float32) - outs[0]).max(initial=0) <= tolerance
        (ids,) = run(context.model, hidden, ("moe.0.expert_ids",))
        dropped += int(((ids < 0) | (ids >= EXPERTS)).sum())
    assert (dropped > 0) == ("more" in case)


def test_the_body_is_dropped_with_its_last_use() -> None:
    context = one_layer()
    names = {key[1] for key in lowered(context, "unrolled").model.functions}
    assert names == {"Dispatch", "Combine"}
    assert {key[1] for key in lowered(context, "loop").model.functions} == {
        "Dispatch",
        "Combine",
        "GroupedMatMul",
    }
    stacked = lowered(context, "unrolled").model.graph.initializers
    assert "up_0" not in stacked and "up_0.7" in stacked


@pytest.mark.parametrize("plugin", [False, True])
def test_measured_choice_reports_both_forms(plugin: bool) -> None:
    """The loop is timed as it would run: by the CPU plugin's kernel where that is installed."""
    context = one_layer()
    context.options = {"cpu_plugin": cpu_plugin_path() if plugin else None}
    UnrollExperts().apply(context)
    up, down = context.decisions
    assert up.subject == f"layer0: experts {EXPERTS} x [{HIDDEN}, {INNER}]"
    assert down.subject == f"layer0: experts {EXPERTS} x [{INNER}, {HIDDEN}]"
    for decision in (up, down):
        (other,) = decision.alternatives
        assert {decision.choice, other.choice} == {"unrolled", "loop"}
        loop = "one kernel of the CPU plugin" if plugin else "the op's body"
        assert re.fullmatch(
            r"faster here over 1 and 64 tokens \(\d+\.\d\d times, geometric mean; the loop is "
            + re.escape(loop)
            + r"\)",
            decision.reason,
        )
        for measured in (decision.measured_ms, other.measured_ms):
            assert set(measured) == {"T=1", "T=64"} and all(ms > 0 for ms in measured.values())


def test_a_forced_choice_says_so() -> None:
    for choice in ("unrolled", "loop"):
        decisions = lowered(one_layer(), choice).decisions
        assert [(d.choice, d.reason) for d in decisions] == [
            (choice, f"asked for by expert_lowering = {choice}")
        ] * 2


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UsageError, match="expert_lowering: unknown value 'unroled'; nearest: unrolled"):
        lowered(one_layer(), "unroled")


def test_too_many_experts_stay_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unroll_experts, "NODE_LIMIT", 2 * EXPERTS - 1)
    context = one_layer()
    UnrollExperts().apply(context)
    assert {d.choice for d in context.decisions} == {"loop"}
    assert (
        f"unrolling makes {2 * EXPERTS} MatMul nodes, more than {2 * EXPERTS - 1}"
        in context.decisions[0].reason
    )
    assert context.decisions[0].alternatives[0].choice == "unrolled"


def test_large_layers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unroll_experts, "MEASURE_LIMIT", 10)
    context = one_layer()
    UnrollExperts().apply(context)
    assert {d.choice for d in context.decisions} == {"unrolled"}
    assert "not measured here" in context.decisions[0].reason
    assert not context.decisions[0].measured_ms


def test_float16_is_timed_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def measure(kind: Any, *_options: Any) -> dict[str, dict[str, float]]:
        seen.append(kind.dtype)
        return {"unrolled": {"T=1": 1.0}, "loop": {"T=1": 2.0}}

    monkeypatch.setattr(unroll_experts, "_measure", measure)
    router = "wide = Cast <to = 1> (logits)\n" + SOFTMAX_RENORMALISED.replace("(logits)", "(wide)")
    UnrollExperts().apply(one_layer(router, dtype="float16"))
    UnrollExperts().apply(one_layer())
    assert seen == ["float16"] * 2 + ["float32"] * 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_probes_of_both_dtypes_run(dtype: str) -> None:
    kind = unroll_experts._Kind(4, 3, 5, False, 2, dtype)
    times = unroll_experts._measure(kind, 20, 1, None)
    assert set(times) == {"unrolled", "loop"}


def test_computed_weights_stay_in_the_loop() -> None:
    text = "up_0 = Mul (up_raw, two)\n" + layer_text(SOFTMAX_RENORMALISED)
    weights = layer_weights()
    weights["up_raw"] = weights.pop("up_0")
    context = context_of(model_of(text, {**weights, "two": np.array(2.0, np.float32)}))
    new = lowered(context, "unrolled")
    assert [d.choice for d in new.decisions] == ["loop", "unrolled"]
    assert new.decisions[0].reason == "the weight is computed in the graph, not a constant"
    hidden = tokens(6)
    assert np.allclose(run(new.model, hidden)[0], run(context.model, hidden)[0], atol=1e-6)


def test_one_expert_and_every_expert() -> None:
    for experts, chosen in ((1, 1), (2, 2)):
        text = layer_text(SOFTMAX_RENORMALISED).replace(
            f"num_experts = {EXPERTS}", f"num_experts = {experts}"
        )
        weights = {**layer_weights(experts=experts), "k": np.array([chosen], np.int64)}
        context = context_of(model_of(text, weights))
        new = lowered(context, "unrolled")
        hidden = tokens(5)
        assert np.allclose(run(new.model, hidden)[0], run(context.model, hidden)[0], atol=1e-6)


def grouped(weight: ir.Value, rows: ir.Value, offsets: ir.Value, transposed: int) -> ir.Node:
    node = ir.node(
        "GroupedMatMul", [rows, weight, offsets], attributes={"transposed": transposed}, domain="moe_export"
    )
    node.outputs[0].name, node.outputs[0].type = f"out_{transposed}", rows.type
    return node


def test_a_weight_used_as_it_is_and_transposed() -> None:
    array = np.random.default_rng(0).standard_normal((3, 4, 4)).astype(np.float32)
    weight = ir.Value(name="w", const_value=ir.tensor(array, name="w"), type=ir.TensorType(ir.DataType.FLOAT))
    weight.shape = ir.Shape((3, 4, 4))
    rows = ir.Value(name="hidden", shape=ir.Shape(["m", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    offsets = ir.Value(name="offsets", shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.INT64))
    nodes = [grouped(weight, rows, offsets, transposed) for transposed in (0, 1)]
    # A name that the unrolled matrices would like is taken by something else.
    taken = ir.Value(name="w.1", const_value=ir.tensor(np.zeros((4, 4), np.float32), name="w.1"))
    taken.type, taken.shape = weight.type, ir.Shape((4, 4))
    graph = ir.Graph(
        [rows, offsets],
        [n.outputs[0] for n in nodes],
        nodes=nodes,
        initializers=[weight, taken],
        name="g",
        opset_imports={"": 20, "moe_export": 1},
    )
    unroller = Unroller(graph)
    for node in nodes:
        unroller.unroll(node, drops=False)
    model = ir.Model(graph, ir_version=10)
    hidden = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    plain, across = run(model, hidden, ("out_0", "out_1"), offsets=np.array([0, 1, 4, 6], np.int64))
    owner = [0, 1, 1, 1, 2, 2]
    assert np.allclose(
        plain, np.stack([h @ array[e].T for h, e in zip(hidden, owner, strict=True)]), atol=1e-6
    )
    assert np.allclose(
        across, np.stack([h @ array[e] for h, e in zip(hidden, owner, strict=True)]), atol=1e-6
    )


def test_top_k_of_the_layer_reaches_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measure(kind: Any, *_options: Any) -> dict[str, dict[str, float]]:
        seen.append(kind.top_k)
        return {"unrolled": {"T=1": 1.0}, "loop": {"T=1": 2.0}}

    monkeypatch.setattr(unroll_experts, "_measure", measure)
    UnrollExperts().apply(one_layer())
    assert seen == [TOP_K] * 2


def test_rows_that_no_dispatch_sorted() -> None:
    """Attention experts (JetMoE) are sorted by other nodes, and some rows may belong to none."""
    text = layer_text(SOFTMAX_RENORMALISED) + "extra = moe_export.GroupedMatMul (hidden, up_0, where)\n"
    where = np.array([1, 2, 2, 3, 3, 3, 4, 4, 5], np.int64)
    model = model_of(text, {**layer_weights(), "where": where}, outputs=f", float[m, {INNER}] extra")
    context = context_of(model)
    new = lowered(context, "unrolled")
    assert count(new, "GroupedMatMul") == 0
    assert new.decisions[-1].subject == f"extra: experts {EXPERTS} x [{HIDDEN}, {INNER}]"
    for old, lowered_value in zip(
        run(context.model, tokens(7), ("out", "extra")),
        run(new.model, tokens(7), ("out", "extra")),
        strict=True,
    ):
        assert np.allclose(old, lowered_value, atol=1e-6)
