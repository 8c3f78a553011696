"""Experts become QMoE where its form is proven, routed as the model says; others stay float with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from moe_export.errors import UsageError
from moe_export.ops import DOMAIN
from moe_export.ops.quantization import KINDS, dequantize, quantize
from moe_export.passes.base import PassContext
from moe_export.passes.bfloat16_weights import BFloat16Weights
from moe_export.passes.fuse_experts import FuseExperts
from moe_export.passes.quantize_experts import QuantizeExperts
from moe_export.passes.unroll_experts import UnrollExperts
from moe_export.runtime.instrument import traced_model

from . import moe_graphs
from .moe_graphs import EXPERTS, TOP_K, context_of, model_of, run
from .test_fuse_experts import CLAMPED, ERF, GATED, SILU, SPLIT, layer

WIDE, INNER = 64, 32
PAIRS = f"""
    pairs = Constant <value_ints = [0, {INNER}, 2]> ()
    paired = Reshape (inner, pairs)
    first = Constant <value_int = 0> ()
    second = Constant <value_int = 1> ()
    gate = Gather <axis = 2> (paired, first)
    linear = Gather <axis = 2> (paired, second)
"""
FORMS = {
    "silu": SPLIT + SILU + GATED,
    "silu, interleaved": PAIRS + SILU + GATED,
    "clamped": PAIRS + CLAMPED,
    "relu, plain": "active = Relu (inner)",
}
REFUSED = {
    "gated gelu": (SPLIT + ERF + GATED, "QMoE has no gated gelu"),
    "relu squared": ("bent = Relu (inner)\n active = Mul (bent, bent)", "QMoE has no relu2"),
    "a leak": ("active = LeakyRelu <alpha = 0.1> (inner)", "its activation"),
    "gelu, plain": (ERF.replace("gate", "inner") + "active = Identity (bent)", "tanh approximation"),
}


def arrays(gated: bool, inner: int = INNER) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    wide = inner * (2 if gated else 1)
    shapes = {
        "up_0": (EXPERTS, wide, WIDE), "down_0": (EXPERTS, WIDE, inner), "router_0": (WIDE, EXPERTS),
        "up_bias": (EXPERTS, wide), "down_bias": (EXPERTS, WIDE),
    }  # fmt: skip
    return {n: (rng.standard_normal(s) * 0.2).astype(np.float32) for n, s in shapes.items()}


def context(
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    *,
    kind: str | None = "int8",
    biased: bool = False,
    transposed: int = 0,
    inner: int = INNER,
    dtype: str = "float32",
    rounded: bool = False,
    text: str | None = None,
) -> PassContext:
    """One layer of hidden size 64. ``rounded``: with the weights that the codes of ``kind`` stand for."""
    import onnx_ir.passes.common as common

    monkeypatch.setattr(moe_graphs, "HIDDEN", WIDE)
    made = arrays("gate" in form and "inner_" not in form, inner)
    for name in ("up_0", "down_0"):
        if rounded and kind:
            made[name] = dequantize(quantize(made[name], KINDS[kind])).astype(np.float32)
        if transposed:
            made[name] = np.ascontiguousarray(made[name].swapaxes(1, 2))
    graph = text or layer(form, biased=biased, transposed=transposed)
    model = model_of(graph, made, dtype=dtype)
    common.IdentityEliminationPass()(model)
    options = {} if kind is None or rounded else {"quantize": kind}
    return context_of(model, dtype=dtype, **options)


def tokens(count: int, dtype: str = "float32") -> NDArray[Any]:
    return np.random.default_rng(count).standard_normal((count, WIDE)).astype(dtype)


def qmoe(ctx: PassContext) -> ir.Node:
    (node,) = [n for n in ctx.model.graph if n.op_type == "QMoE"]
    return node


def error(got: NDArray[Any], want: NDArray[Any]) -> float:
    return float(np.abs(got - want).max() / max(1e-6, np.abs(want).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("biased", "transposed"), [(False, 0), (True, 0), (False, 1)])
@pytest.mark.parametrize("name", FORMS)
def test_a_proven_form_becomes_one_op_that_routes_as_the_model_does(
    name: str, biased: bool, transposed: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form: dict[str, Any] = {"kind": kind, "biased": biased, "transposed": transposed}
    lowered = context(monkeypatch, FORMS[name], **form)
    rounded = context(monkeypatch, FORMS[name], **form, rounded=True)
    QuantizeExperts().apply(lowered)
    assert lowered.quantized == (0,) and not [n for n in lowered.model.graph if n.domain == DOMAIN]
    assert lowered.decisions[-1].choice.startswith(f"{kind} in blocks of 32, one QMoE op")
    node = qmoe(lowered)
    attributes = {k: a.value for k, a in node.attributes.items()}
    assert attributes["normalize_routing_weights"] == 0 and attributes["k"] == TOP_K
    assert node.inputs[14] is not None, "without router_weights QMoE renormalises silently"
    assert attributes["swiglu_fusion"] == ("relu" not in name)
    names = ("out", "moe.0.expert_ids", "moe.0.weights", "moe.0.output", "moe.0.hidden")
    for count in (0, 1, 7, 40):
        got, want = (run(m.model, tokens(count), names) for m in (lowered, rounded))
        assert [a.shape for a in got] == [a.shape for a in want]
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_array_equal(got[2], want[2])
        if count:
            # The rounded weights are the same; what is left are int8 activations.
            assert error(got[0], want[0]) < 0.03, count


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_qmoe_lacks_stays_float_and_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, reason = REFUSED[name]
    ctx = context(monkeypatch, text)
    plain = context(monkeypatch, text, kind=None)
    QuantizeExperts().apply(ctx)
    assert ctx.quantized == () and "QMoE" not in [n.op_type for n in ctx.model.graph]
    assert ctx.decisions[-1].choice == "not int8: float" and reason in ctx.decisions[-1].reason
    assert "no MoE layer could be quantised" in ctx.notes[-1]
    np.testing.assert_array_equal(run(ctx.model, tokens(5))[0], run(plain.model, tokens(5))[0])


def test_sizes_without_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(monkeypatch, "active = Relu (inner)", inner=24)
    QuantizeExperts().apply(ctx)
    assert "64 and 24 are not both multiples of 16" in ctx.decisions[-1].reason
    smaller = context(monkeypatch, "active = Relu (inner)", inner=16)
    QuantizeExperts().apply(smaller)
    assert smaller.decisions[-1].choice.startswith("int8 in blocks of 16")


def test_without_the_option_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(monkeypatch, FORMS["silu"], kind=None)
    QuantizeExperts().apply(ctx)
    assert not ctx.decisions and not ctx.notes and not ctx.quantized
    ctx.options = {"quantize": "int3"}
    with pytest.raises(UsageError, match="unknown value 'int3'"):
        QuantizeExperts().apply(ctx)


def test_later_passes_leave_a_quantised_layer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(monkeypatch, FORMS["silu"])
    ctx.options = {**ctx.options, "fused_experts": True}
    QuantizeExperts().apply(ctx)
    before = run(ctx.model, tokens(9))[0]
    ctx.dtype = "bfloat16"
    for later in (FuseExperts(), UnrollExperts(), BFloat16Weights()):
        later.apply(ctx)
    assert ctx.fused == ()
    node = qmoe(ctx)
    stored = [node.inputs[i] for i in (2, 3, 5, 6)]
    assert [v.dtype.name for v in stored if v is not None and v.dtype is not None] == [
        "UINT8", "FLOAT", "UINT8", "FLOAT",
    ]  # fmt: skip
    assert error(run(ctx.model, tokens(9))[0], before) < 0.05


def test_float16_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    text = layer(FORMS["silu"]).replace("order, weights)", "order, wide)")
    text = text.replace("last_rows =", "wide = Cast <to = 1> (weights)\n last_rows =")
    lowered = context(monkeypatch, FORMS["silu"], dtype="float16", text=text)
    plain = context(monkeypatch, FORMS["silu"], dtype="float16", kind=None, text=text)
    QuantizeExperts().apply(lowered)
    hidden = tokens(7, "float16")
    (got,), (want,) = run(lowered.model, hidden), run(plain.model, hidden)
    assert got.dtype == np.float16 and error(got.astype(np.float32), want.astype(np.float32)) < 0.05


def forced(ctx: PassContext, folder: Path) -> Any:
    """The model with its routing as inputs."""
    import onnxruntime as ort

    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    onnx.save(ir.to_proto(ctx.model), path)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    model = traced_model(path, ctx.layers, force_routing=True)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def call(hidden: NDArray[Any], ids: Any, weights: Any) -> NDArray[Any]:
        feed = {
            "moe.0.expert_ids": np.asarray(ids, np.int32),
            "moe.0.weights": np.asarray(weights, np.float32),
        }
        (out,) = session.run(["moe.0.output"], {"hidden": hidden, **feed})
        return np.asarray(out)

    return call


def test_forced_routing_decides_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lowered = context(monkeypatch, FORMS["silu"])
    drops = layer(FORMS["silu"]).replace("drops = 0", "drops = 1")
    rounded = context(monkeypatch, FORMS["silu"], rounded=True, text=drops)
    QuantizeExperts().apply(lowered)
    got, want = forced(lowered, tmp_path), forced(rounded, tmp_path)
    # In order: not renormalised; lower ids than a tie would give; weight 0; dropped; all dropped; one twice.
    ids = [[0, 1], [1, 0], [2, 3], [-1, 4], [-1, -1], [5, 5]]
    weights = [[2.5, 0.25], [0.1, 0.1], [0.0, 1.0], [0.0, 0.7], [0.0, 0.0], [0.5, 0.25]]
    hidden = tokens(6)
    for row in range(6):
        mine, theirs = (
            f(hidden[row : row + 1], ids[row : row + 1], weights[row : row + 1]) for f in (got, want)
        )
        assert error(mine, theirs) < 0.03 or (row == 4 and not mine.any() and not theirs.any()), row
    assert error(got(hidden, ids, weights), want(hidden, ids, weights)) < 0.03


def test_what_qmoe_would_swallow_comes_out_as_nan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind in KINDS:
        ctx = context(monkeypatch, FORMS["silu"], kind=kind)
        QuantizeExperts().apply(ctx)
        call = forced(ctx, tmp_path)
        hidden, ids = tokens(6), [[e, e + 1] for e in range(6)]
        weights = np.full((6, 2), 0.5, np.float32)
        hidden[1, 3], hidden[2, 0] = np.nan, np.inf
        weights[3, 1], weights[4, 0] = np.nan, -0.5
        out = call(hidden, ids, weights)
        assert np.isnan(out[1:5]).all(), kind
        assert np.isfinite(out[[0, 5]]).all()
