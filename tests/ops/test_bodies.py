"""Each op's ONNX body against its float64 reference: stock ONNX Runtime and onnx.reference, every opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from moe_export.errors import UsageError
from moe_export.ops import OPS
from moe_export.ops.contract import FLOAT_TYPES

from .cases import (
    EXPERTS,
    QUANTIZED_EXPERTS,
    ROUTERS,
    expert_ids,
    expert_inputs,
    quantized_inputs,
    randoms,
    router_inputs,
    routings,
)
from .one_op import (
    NUMPY,
    OPSETS,
    assert_equal,
    evaluate,
    expected,
    in_onnx_reference,
    in_onnxruntime,
    onnx_model,
    problem,
)

BOTH = (in_onnxruntime, in_onnx_reference)
FLOATS = [
    ("float32", "float32"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("float32", "bfloat16"),
    ("float16", "bfloat16"),
]
"""Activations and weights: every dtype the contracts list, and weights stored smaller."""


def output_dtype(dtype: str) -> Any:
    """What the model of one op returns: its own dtype, bfloat16 as float32."""
    return NUMPY["float32" if dtype == "bfloat16" else dtype]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("run", BOTH)
def test_dispatch(run: Any, opset: int) -> None:
    for ids, experts in routings():
        inputs = {"expert_ids": ids}
        attributes = {"num_experts": experts}
        got, want = run("Dispatch", inputs, attributes, opset), expected("Dispatch", inputs, attributes)
        assert_equal("Dispatch", "int64", got, want)
        assert [a.dtype for a in got] == [np.dtype(np.int64)] * 3


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("run", BOTH)
def test_grouped_matmul(run: Any, transposed: int, opset: int) -> None:
    for ids, experts in routings():
        order, offsets, _ = OPS["Dispatch"].reference(ids, experts)
        for dtype, weight_dtype in FLOATS if opset == 20 else FLOATS[:1]:
            shape = (experts, 6, 5) if transposed else (experts, 5, 6)
            inputs = {
                "rows": randoms(dtype, len(order), 6),
                "weight": randoms(weight_dtype, *shape, seed=1),
                "offsets": offsets,
            }
            attributes = {"transposed": transposed}
            got = run("GroupedMatMul", inputs, attributes, opset)
            assert_equal("GroupedMatMul", dtype, got, expected("GroupedMatMul", inputs, attributes))
            assert got[0].dtype == output_dtype(dtype)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("engine", ["onnxruntime", "onnx.reference"])
def test_expert_matmul(engine: str, opset: int) -> None:
    for ids, experts in routings():
        order, offsets, _ = OPS["Dispatch"].reference(ids, experts)
        for dtype, weight_dtype in FLOATS if opset == 20 else FLOATS[:1]:
            rows = randoms(dtype, len(order), 6)
            weight = randoms(weight_dtype, experts, 5, 6, seed=1)
            dtypes = {"rows": dtype, "offsets": "int64", "weight": weight_dtype}
            model = onnx_model("ExpertMatMul", {"num_experts": experts}, dtypes, opset)
            feeds = {"rows": rows, "offsets": offsets, **{f"weight_{e}": w for e, w in enumerate(weight)}}
            got = evaluate(engine, model, feeds)
            want = OPS["ExpertMatMul"].reference(rows, offsets, *weight, num_experts=experts)
            assert_equal("ExpertMatMul", dtype, got, [want])
            assert got[0].dtype == output_dtype(dtype)
            with pytest.raises(UsageError, match=f"{experts + 1} matrices for {experts} experts"):
                OPS["ExpertMatMul"].reference(rows, offsets, *weight, weight[0], num_experts=experts)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("engine", ["onnxruntime", "onnx.reference"])
def test_scaled_expert_matmul(engine: str, opset: int) -> None:
    """Matrices are initializers, as NumPy cannot hand float8 to ONNX Runtime."""
    attributes = {"block_rows": 2, "block_columns": 4}
    for ids, experts in routings():
        order, offsets, _ = OPS["Dispatch"].reference(ids, experts)
        for dtype in FLOAT_TYPES if opset == 20 else FLOAT_TYPES[:1]:
            rows = randoms(dtype, len(order), 6)
            weight = randoms("float32", experts, 5, 6, seed=1).astype(NUMPY["float8e4m3fn"])
            scale = np.abs(randoms("float32", experts, 3, 2, seed=2)) + np.float32(0.1)
            full = {"num_experts": experts, **attributes}
            dtypes = {"rows": dtype, "offsets": "int64", "scale": "float32", "weight": "float8e4m3fn"}
            model = onnx_model("ScaledExpertMatMul", full, dtypes, opset)
            del model.graph.input[3:]
            model.graph.initializer.extend(
                onnx.numpy_helper.from_array(w, f"weight_{e}") for e, w in enumerate(weight)
            )
            got = evaluate(engine, model, {"rows": rows, "offsets": offsets, "scale": scale})
            reference = OPS["ScaledExpertMatMul"].reference
            assert_equal("ScaledExpertMatMul", dtype, got, [reference(rows, offsets, scale, *weight, **full)])
            assert got[0].dtype == output_dtype(dtype)
            if offsets[-1] > offsets[0]:
                wrong = reference(rows, offsets, scale[:, ::-1], *weight, **full)
                assert problem(OPS["ScaledExpertMatMul"], dtype, got[0], wrong)
            with pytest.raises(UsageError, match=f"{experts + 1} matrices and scales of {experts} for"):
                reference(rows, offsets, scale, *weight, weight[0], **full)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("run", BOTH)
def test_combine(run: Any, opset: int) -> None:
    for ids, experts in routings():
        order, _, _ = OPS["Dispatch"].reference(ids, experts)
        for dtype in ("float32", "float16", "bfloat16"):
            inputs = {
                "rows": randoms(dtype, len(order), 6),
                "order": order,
                "weights": randoms("float32", *ids.shape, seed=1),
            }
            got = run("Combine", inputs, {}, opset)
            assert_equal("Combine", dtype, got, expected("Combine", inputs, {}))
            assert got[0].dtype == output_dtype(dtype)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("run", BOTH)
def test_router(run: Any, router: str, opset: int) -> None:
    for top_k in (1, 2, 4):
        attributes = {"top_k": top_k, **ROUTERS[router]}
        for tokens in (0, 1, 2, 24):
            for dtype in FLOAT_TYPES if opset == 20 and top_k == 2 else ("float32",):
                inputs = router_inputs(attributes, dtype, tokens)
                got, want = run("Router", inputs, attributes, opset), expected("Router", inputs, attributes)
                assert_equal("Router", "float32", got, want)
                assert [a.dtype.name for a in got] == ["float32", "int32"]


@pytest.mark.parametrize("run", BOTH)
def test_router_that_chooses_every_expert(run: Any) -> None:
    attributes = {"top_k": 8, "renormalize": 1}
    inputs = router_inputs(attributes, "float32", 5)
    got = run("Router", inputs, attributes)
    assert_equal("Router", "float32", got, expected("Router", inputs, attributes))
    assert all(sorted(row) == list(range(8)) for row in got[1].tolist())


@pytest.mark.parametrize("run", BOTH)
def test_router_ties_go_to_the_lower_expert(run: Any) -> None:
    logits = np.array([[1, 2, 2, 2], [0, 0, 0, 0], [3, -1, 3, -1]], np.float32)
    _, ids = run("Router", {"logits": logits}, {"top_k": 2})
    assert ids.tolist() == [[1, 2], [0, 1], [0, 2]]


@pytest.mark.parametrize("run", BOTH)
def test_router_with_masked_experts(run: Any) -> None:
    logits = np.array([[-np.inf, 1, -np.inf, 0.5], [0, -np.inf, -np.inf, -np.inf]], np.float32)
    inputs, attributes = {"logits": logits}, {"top_k": 1}
    assert_equal(
        "Router", "float32", run("Router", inputs, attributes), expected("Router", inputs, attributes)
    )


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("variant", EXPERTS)
@pytest.mark.parametrize("run", BOTH)
def test_expert_mlp(run: Any, variant: str, opset: int) -> None:
    attributes = EXPERTS[variant]
    sizes = [(0, 2, 4), (1, 2, 4), (7, 2, 4), (5, 4, 4)] if opset == 20 else [(7, 2, 4)]
    for tokens, top_k, experts in sizes:
        ids = expert_ids(tokens, top_k, experts)
        for dtype, weight_dtype in FLOATS if opset == 20 and tokens == 7 else FLOATS[:1]:
            inputs = expert_inputs(attributes, ids, experts, dtype, weight_dtype)
            full = {"num_experts": experts, **attributes}
            got = run("ExpertMLP", inputs, full, opset)
            assert_equal("ExpertMLP", dtype, got, expected("ExpertMLP", inputs, full))
            assert got[0].dtype == output_dtype(dtype)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("variant", QUANTIZED_EXPERTS)
@pytest.mark.parametrize("run", BOTH)
def test_quantized_expert_mlp(run: Any, variant: str, opset: int) -> None:
    attributes = QUANTIZED_EXPERTS[variant]
    sizes = [(0, 2, 4), (1, 2, 4), (7, 2, 4), (5, 4, 4)] if opset == 20 else [(7, 2, 4)]
    for tokens, top_k, experts in sizes:
        ids = expert_ids(tokens, top_k, experts)
        for dtype in FLOAT_TYPES if opset == 20 and tokens == 7 else ("float32",):
            inputs = quantized_inputs(attributes, ids, experts, dtype, hidden=2, inner=3)
            full = {"num_experts": experts, **attributes}
            got, want = (
                run("QuantizedExpertMLP", inputs, full, opset),
                expected("QuantizedExpertMLP", inputs, full),
            )
            assert_equal("QuantizedExpertMLP", dtype, got, want)
            assert got[0].dtype == output_dtype(dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_expert_mlp_rejects_broken_weights(bits: int) -> None:
    ids, attributes = expert_ids(7, 2, 4, strangers=False), {"num_experts": 4, "bits": bits}
    inputs = quantized_inputs(attributes, ids, 4, "float32", hidden=2, inner=3)
    want = expected("QuantizedExpertMLP", inputs, attributes)
    up, scales = inputs["up_codes"], inputs["up_scales"]
    broken = {
        "scales of the next block": {"up_scales": np.roll(scales, 1, axis=2)},
        "one expert's scales doubled": {"up_scales": scales * np.array([1, 1, 2, 1])[:, None, None, None]},
        "gate and up exchanged": {"up_codes": np.roll(up, 32, axis=3), "up_scales": np.roll(scales, 32, 3)},
        "codes of the next input": {"up_codes": np.roll(up, 1, axis=2)},
    }
    if bits == 4:
        broken["nibbles exchanged"] = {"up_codes": (up >> 4) | (up << 4)}
    for name, change in broken.items():
        changed = {k: np.ascontiguousarray(v.astype(inputs[k].dtype)) for k, v in change.items()}
        (got,) = in_onnxruntime("QuantizedExpertMLP", {**inputs, **changed}, attributes)
        assert problem(OPS["QuantizedExpertMLP"], "float32", got, want[0]), name


@pytest.mark.parametrize("run", BOTH)
def test_an_expert_without_tokens_may_hold_anything(run: Any) -> None:
    ids = np.zeros((3, 1), np.int32)
    order, offsets, _ = OPS["Dispatch"].reference(ids, 2)
    weight = randoms("float32", 2, 5, 6)
    weight[1] = np.nan
    inputs = {"rows": randoms("float32", 3, 6), "weight": weight, "offsets": offsets}
    (got,) = run("GroupedMatMul", inputs, {})
    assert np.isfinite(got).all()
