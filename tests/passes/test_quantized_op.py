"""Quantised experts as the CPU plugin's op: which forms, with what numbers, and when it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from moe_export.errors import UsageError
from moe_export.ops.quantization import KINDS
from moe_export.passes import quantized_times
from moe_export.passes.base import PassContext
from moe_export.passes.bfloat16_weights import BFloat16Weights
from moe_export.passes.fuse_experts import FuseExperts
from moe_export.passes.quantize_experts import QuantizeExperts
from moe_export.passes.quantized_choice import QMOE_FASTER, _choose
from moe_export.passes.quantized_times import FLOAT, PLUGIN, QMOE, Times
from moe_export.passes.unroll_experts import UnrollExperts
from tests.plugins.kernels import plugin, with_plugin

from .moe_graphs import run
from .test_quantize_experts import FORMS, REFUSED, context, error, forced, tokens

OWN_FORMS = {**FORMS, **{name: text for name, (text, _) in REFUSED.items() if name != "a leak"}}
NO_PROBLEMS = {QMOE: "", PLUGIN: ""}


def quantised(
    monkeypatch: pytest.MonkeyPatch, form: str, lowering: str = "plugin", **more: Any
) -> PassContext:
    """One layer after the pass, with the CPU plugin at hand."""
    ctx = context(monkeypatch, form, **more)
    ctx.options = {**ctx.options, "cpu_plugin": plugin(), "quantized_lowering": lowering, "threads": 1}
    QuantizeExperts().apply(ctx)
    return ctx


def own_op(ctx: PassContext) -> ir.Node:
    (node,) = [n for n in ctx.model.graph if n.op_type == "QuantizedExpertMLP"]
    return node


def in_plugin(ctx: PassContext, hidden: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(ctx.model).SerializeToString(), with_plugin(1), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(["out"], {"hidden": hidden})[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("biased", "transposed"), [(False, 0), (True, 1)])
@pytest.mark.parametrize("name", OWN_FORMS)
def test_every_form_of_the_fused_op_has_a_quantised_one(
    name: str, biased: bool, transposed: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form: dict[str, Any] = {"kind": kind, "biased": biased, "transposed": transposed}
    lowered = quantised(monkeypatch, OWN_FORMS[name], **form)
    rounded = context(monkeypatch, OWN_FORMS[name], **form, rounded=True)
    assert lowered.quantized == (0,)
    decision = lowered.decisions[-1]
    assert decision.choice == f"{kind} in blocks of 32, one QuantizedExpertMLP op of the CPU plugin"
    node = own_op(lowered)
    assert node.attributes["bits"].as_int() == KINDS[kind]
    for count in (0, 1, 7, 40):
        got, want = in_plugin(lowered, tokens(count)), run(rounded.model, tokens(count))[0]
        assert got.shape == want.shape
        if count:
            # The weights are the same and activations stay floats: only float32 rounding is left.
            assert error(got, want) < 5e-6, count
            assert error(run(lowered.model, tokens(count))[0], want) < 5e-6, "by the op's body"


def test_what_no_op_has_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = quantised(monkeypatch, REFUSED["a leak"][0])
    assert ctx.quantized == () and "its activation" in ctx.decisions[-1].reason


def test_times_and_the_other_form_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = quantised(monkeypatch, FORMS["silu"], "auto")
    decision = ctx.decisions[-1]
    assert set(decision.measured_ms) == {"T=1", "T=64"} and min(decision.measured_ms.values()) > 0
    assert len(decision.alternatives) == 2
    assert all(set(other.measured_ms) == {"T=1", "T=64"} for other in decision.alternatives)
    assert "at T=1" in decision.reason and "at T=64" in decision.reason
    assert "against the CPU plugin's float32 op" in decision.reason


def test_a_form_that_only_one_op_has_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = quantised(monkeypatch, OWN_FORMS["gated gelu"], "auto")
    own_op(ctx)
    assert "QMoE has no gated gelu" in ctx.decisions[-1].reason
    assert ctx.decisions[-1].alternatives[0].reason == "QMoE has no gated gelu"


def test_the_option_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = quantised(monkeypatch, FORMS["silu"], "qmoe")
    assert "QMoE" in [n.op_type for n in ctx.model.graph]
    assert "quantized_lowering = qmoe was asked for" in ctx.decisions[-1].reason
    left = quantised(monkeypatch, OWN_FORMS["gated gelu"], "qmoe")
    assert left.quantized == () and left.decisions[-1].reason == "QMoE has no gated gelu"
    with pytest.raises(UsageError, match="quantized_lowering: unknown value 'qmo'; nearest: qmoe"):
        quantised(monkeypatch, FORMS["silu"], "qmo")


def test_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(monkeypatch, FORMS["silu"])
    QuantizeExperts().apply(ctx)
    assert "QMoE" in [n.op_type for n in ctx.model.graph]
    assert "there is no CPU plugin here" in ctx.decisions[-1].reason
    alone = context(monkeypatch, FORMS["silu"])
    alone.options = {**alone.options, "quantized_lowering": "plugin"}
    QuantizeExperts().apply(alone)
    assert alone.quantized == () and alone.decisions[-1].reason == "there is no CPU plugin here"


def times(qmoe: tuple[float, float], own: tuple[float, float]) -> Times:
    labels = ("T=1", "T=64")
    forms = {QMOE: qmoe, PLUGIN: own, FLOAT: (4.0, 4.0)}
    return Times("", {form: dict(zip(labels, ms, strict=True)) for form, ms in forms.items()})


@pytest.mark.parametrize(
    ("qmoe", "own", "chosen"),
    [
        ((1.0, 1.0), (2.0, 2.0), QMOE),
        ((2.0, 2.0), (1.0, 1.0), PLUGIN),
        ((1.0, 1.0), (QMOE_FASTER * 0.99, QMOE_FASTER * 0.99), PLUGIN),
        ((1.0, 1.0), (QMOE_FASTER * 1.01, QMOE_FASTER * 1.01), QMOE),
        ((1.0, 3.0), (2.0, 1.0), PLUGIN),
        ((1.0, 1.4), (2.0, 1.0), QMOE),
    ],
)
def test_the_faster_op_is_taken(qmoe: Any, own: Any, chosen: str) -> None:
    op, why = _choose((QMOE, PLUGIN), NO_PROBLEMS, times(qmoe, own))
    assert op == chosen
    assert ("near equality" in why) == (own == (QMOE_FASTER * 0.99, QMOE_FASTER * 0.99))
    assert _choose((QMOE, PLUGIN), NO_PROBLEMS, Times("not timed"))[0] == PLUGIN


def test_of_a_large_layer_some_experts_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_times, "MEASURE_LIMIT", 4 * 4 * 3 * 64 * 32)
    ctx = quantised(monkeypatch, FORMS["silu"], "auto")
    assert "(with 4 of 8 experts)" in ctx.decisions[-1].reason
    monkeypatch.setattr(quantized_times, "MEASURE_LIMIT", 4 * 3 * 64 * 32)
    ctx = quantised(monkeypatch, FORMS["silu"], "auto")
    own_op(ctx)
    assert "not timed here" in ctx.decisions[-1].reason and not ctx.decisions[-1].measured_ms


def test_later_passes_leave_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = quantised(monkeypatch, FORMS["silu"], biased=True)
    ctx.options = {**ctx.options, "fused_experts": True}
    before = in_plugin(ctx, tokens(9))
    ctx.dtype = "bfloat16"
    for later in (FuseExperts(), UnrollExperts(), BFloat16Weights()):
        later.apply(ctx)
    assert ctx.fused == ()
    dtypes = [v.dtype.name for v in own_op(ctx).inputs[3:] if v is not None and v.dtype is not None]
    assert dtypes == ["INT8", "FLOAT", "INT8", "FLOAT", "FLOAT", "FLOAT"]
    assert error(in_plugin(ctx, tokens(9)), before) < 0.05


def test_forced_routing_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    got = forced(quantised(monkeypatch, FORMS["silu"]), tmp_path)
    want = forced(context(monkeypatch, FORMS["silu"], rounded=True), tmp_path)
    hidden = tokens(4)
    ids, weights = [[0, 1], [1, 0], [2, 3], [5, 5]], [[2.5, 0.25], [0.1, -0.1], [0.0, 1.0], [0.5, 0.25]]
    assert error(got(hidden, ids, weights), want(hidden, ids, weights)) < 5e-6
    hidden[1, 3] = np.nan
    assert np.isnan(got(hidden, ids, weights)[1]).all()
