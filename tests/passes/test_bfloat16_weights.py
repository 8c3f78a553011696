"""Weights stored in bfloat16: half the bytes, the values rounded once, arithmetic in float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from moe_export.passes import bfloat16_weights
from moe_export.passes.base import PassContext
from moe_export.passes.bfloat16_weights import BFloat16Weights

from .moe_graphs import one_layer, run, tokens


def stored(context: PassContext) -> dict[str, ir.TensorProtocol]:
    values = context.model.graph.initializers.values()
    return {str(v.name): v.const_value for v in values if v.const_value is not None}


def as_bfloat16(context: PassContext, smallest: int, monkeypatch: pytest.MonkeyPatch) -> PassContext:
    monkeypatch.setattr(bfloat16_weights, "SMALLEST", smallest)
    new = PassContext(context.model.clone(), context.io, context.layers, "bfloat16", context.opset)
    new.float32_weights = context.float32_weights
    BFloat16Weights().apply(new)
    return new


def test_other_dtypes_are_left_alone() -> None:
    context = one_layer()
    before = set(stored(context))
    BFloat16Weights().apply(context)
    assert set(stored(context)) == before and not context.decisions


def test_weights_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = one_layer()
    context = as_bfloat16(plain, 100, monkeypatch)
    weights = stored(context)
    for name in ("up_0", "down_0"):
        held = weights[f"{name}.bfloat16"]
        assert held.dtype == ir.DataType.BFLOAT16 and name not in weights
        original = stored(plain)[name].numpy()
        assert np.array_equal(held.numpy(), original.astype(ml_dtypes.bfloat16))
    assert weights["router_0"].dtype == ir.DataType.FLOAT, "48 elements are fewer than 100"
    reference = plain.model.clone()
    for name in ("up_0", "down_0"):
        value = reference.graph.initializers[name]
        assert value.const_value is not None
        rounded = value.const_value.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
        value.const_value = ir.tensor(rounded, name=name)
    hidden = tokens(20)
    assert np.array_equal(run(context.model, hidden)[0], run(reference, hidden)[0])
    assert not np.array_equal(run(context.model, hidden)[0], run(plain.model, hidden)[0])


def test_what_was_cast_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    context = as_bfloat16(one_layer(), 100, monkeypatch)
    (decision,) = context.decisions
    assert decision.choice == "stored in bfloat16, cast to float32 at use"
    assert context.notes == [
        "2 weights (480 elements) are stored in bfloat16 and cast to float32; tensors of fewer than 100 "
        "elements stay float32"
    ]


def test_what_the_family_keeps_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = one_layer()
    plain.float32_weights = frozenset({"up_0"})
    context = as_bfloat16(plain, 100, monkeypatch)
    assert "up_0" in stored(context) and "down_0.bfloat16" in stored(context)


def test_all_weights_small(monkeypatch: pytest.MonkeyPatch) -> None:
    context = as_bfloat16(one_layer(), 10_000, monkeypatch)
    assert all(t.dtype != ir.DataType.BFLOAT16 for t in stored(context).values())
    assert context.notes[0].startswith("0 weights")
