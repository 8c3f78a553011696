"""A float32 norm weight in a float16 graph: ONNX Runtime refuses the fused form and runs the split one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from moe_export.passes.base import PassContext
from moe_export.passes.mixed_norms import SplitMixedNorms, bias_kept
from moe_export.schema import ModelIO, TensorSpec

HIDDEN = 32
RNG = np.random.default_rng(5)
WEIGHT = (1 + 0.3 * RNG.standard_normal(HIDDEN)).astype(np.float32)


def _eighths(*shape: int) -> np.ndarray:
    """Random multiples of 1/8: their sums are exact in float16, in whatever precision they are added."""
    return (np.round(RNG.standard_normal(shape) * 8) / 8).astype(np.float16)


BIAS = _eighths(HIDDEN)


def _context(weight: np.ndarray, bias: np.ndarray | None) -> PassContext:
    """y = RMSNorm(x + skip (+ bias)) * weight, total = x + skip (+ bias), as one fused node."""
    half, kind = TensorProto.FLOAT16, helper.np_dtype_to_tensor_dtype(weight.dtype)
    shape = ["batch", "sequence", HIDDEN]
    held = [numpy_helper.from_array(weight, "weight")]
    names = ["x", "skip", "weight"]
    if bias is not None:
        held.append(numpy_helper.from_array(bias, "bias"))
        names.append("bias")
    node = helper.make_node(
        "SkipSimplifiedLayerNormalization",
        names,
        ["y", "", "", "total"],
        domain="com.microsoft",
        epsilon=1e-3,
    )
    graph = helper.make_graph(
        [node],
        "norm",
        [helper.make_tensor_value_info(n, half, shape) for n in ("x", "skip")],
        [
            helper.make_tensor_value_info("y", kind, shape),
            helper.make_tensor_value_info("total", half, shape),
        ],
        held,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    dims = ("batch", "sequence", HIDDEN)
    io = ModelIO(
        inputs=tuple(TensorSpec(n, "float16", dims, "data") for n in ("x", "skip")),
        outputs=(
            TensorSpec("y", str(weight.dtype), dims, "data"),
            TensorSpec("total", "float16", dims, "data"),
        ),
    )
    return PassContext(ir.from_proto(model), io, (), "float16", 20)


def _session(context: PassContext) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(
        ir.to_proto(context.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _operators(context: PassContext) -> list[str]:
    return [node.op_type for node in context.model.graph]


def test_onnx_runtime_refuses_the_fused_form() -> None:
    with pytest.raises(Exception, match="bound to different types"):
        _session(_context(WEIGHT, None))


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
def test_split_form_computes_the_norm_of_the_sum(bias: np.ndarray | None) -> None:
    context = _context(WEIGHT, bias)
    SplitMixedNorms().apply(context)
    assert "SkipSimplifiedLayerNormalization" not in _operators(context)
    x, skip = _eighths(2, 2, 3, HIDDEN)
    y, total = _session(context).run(["y", "total"], {"x": x, "skip": skip})
    want = x + skip if bias is None else x + skip + bias
    np.testing.assert_array_equal(total, want)
    wide = want.astype(np.float64)
    norm = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, norm * WEIGHT, rtol=1e-5, atol=1e-6)
    assert not np.allclose(y, norm * WEIGHT.astype(np.float16), rtol=1e-5, atol=1e-6)
    assert len(context.decisions) == 1


def test_one_dtype_stays_fused() -> None:
    context = _context(WEIGHT.astype(np.float16), None)
    SplitMixedNorms().apply(context)
    assert _operators(context) == ["SkipSimplifiedLayerNormalization"]
    assert context.decisions == []


def test_fusions_of_transformers_keep_the_bias() -> None:
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    x, skip = _eighths(2, 2, 3, HIDDEN)
    results = []
    for kept in (True, False):
        context = _context(WEIGHT, BIAS)
        if kept:
            with bias_kept():
                fuse_for_onnxruntime(context.model, "cpu")
        else:
            fuse_for_onnxruntime(context.model, "cpu")
        SplitMixedNorms().apply(context)
        results.append(_session(context).run(["total"], {"x": x, "skip": skip})[0])
    np.testing.assert_array_equal(results[0], x + skip + BIAS)
    # The defect itself: when a newer transformers keeps the bias, bias_kept can go.
    np.testing.assert_array_equal(results[1], x + skip)
