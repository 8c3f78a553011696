"""One op of the domain as a model of its own, run in stock ONNX Runtime and in onnx.reference."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from moe_export.ops import DOMAIN, OPS, VERSION, OpContract, Tolerance

OPSETS = (20, 21, 22, 24)
NUMPY = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
INNER = {
    "ExpertMLP": ("Dispatch", "GroupedMatMul", "Combine"),
    "QuantizedExpertMLP": ("Dispatch", "Combine"),
}


def onnx_model(
    name: str, attributes: Mapping[str, Any], dtypes: Mapping[str, str], opset: int
) -> onnx.ModelProto:
    """A model with one node of op ``name``; ``dtypes`` says which inputs there are, all dimensions free."""
    op = OPS[name]
    full = op.complete(attributes)
    given = [p for p in op.inputs if p.name in dtypes]
    inputs = [(n if p.name in dtypes else "", p) for p in op.inputs for n in p.names(full)]
    own = next((dtypes[p.name] for p in given if len(p.dtypes) > 1), "float32")
    first_float = next((dtypes[p.name] for p in given if dtypes[p.name].startswith(("f", "b"))), own)
    names = [p.name for p in op.outputs]
    nodes = []
    if first_float == "bfloat16":
        # NumPy takes no bfloat16 tensor from ONNX Runtime: the (exact) cast brings it out.
        for index, param in enumerate(op.outputs):
            if "bfloat16" in param.dtypes:
                names[index] = f"{param.name}.bfloat16"
                nodes.append(
                    helper.make_node("Cast", [names[index]], [param.name], to=onnx.TensorProto.FLOAT)
                )
        first_float = "float32"
    nodes.insert(
        0,
        helper.make_node(name, [n for n, _ in inputs], names, domain=DOMAIN, **full),
    )
    outputs = [
        _value(p.name, first_float if len(p.dtypes) > 1 else p.dtypes[0], len(p.shape)) for p in op.outputs
    ]
    functions = [
        OPS[inner].function(
            {"num_experts": 1}
            if inner == "Dispatch"
            else {"transposed": full["transposed"]}
            if inner == "GroupedMatMul"
            else {},
            opset,
        )
        for inner in INNER.get(name, ())
    ]
    ranks = {p.name: len(p.shape) for p in given}
    if full.get("packed"):
        ranks |= {"up": 4, "down": 4}
    if full.get("bits") == 4:
        ranks |= {"up_codes": 5, "down_codes": 5}
    graph = helper.make_graph(
        nodes, name, [_value(n, dtypes[p.name], ranks[p.name]) for n, p in inputs if n], outputs
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[*functions, *([] if op.body is None else [op.function(full, opset)])],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _value(name: str, dtype: str, rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(NUMPY[dtype]), [f"{name}_{axis}" for axis in range(rank)]
    )


@functools.cache
def _session(name: str, attributes: tuple[Any, ...], dtypes: tuple[Any, ...], opset: int) -> Any:
    model = onnx_model(name, dict(attributes), dict(dtypes), opset)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@functools.cache
def _evaluator(name: str, attributes: tuple[Any, ...], dtypes: tuple[Any, ...], opset: int) -> Any:
    return ReferenceEvaluator(onnx_model(name, dict(attributes), dict(dtypes), opset))


def _key(name: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any], opset: int) -> tuple[Any, ...]:
    dtypes = tuple((k, v.dtype.name) for k, v in inputs.items() if v is not None)
    return name, tuple(sorted(attributes.items())), dtypes, opset


def in_onnxruntime(
    name: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any], opset: int = 20
) -> list[NDArray[Any]]:
    """The op's outputs by its ONNX body in ONNX Runtime."""
    feeds = {k: _ort_value(v) for k, v in inputs.items() if v is not None}
    outputs = _session(*_key(name, inputs, attributes, opset)).run_with_ort_values(None, feeds)
    return [value.numpy() for value in outputs]


def _ort_value(array: NDArray[Any]) -> Any:
    if array.dtype == NUMPY["bfloat16"]:  # ONNX Runtime takes it as its bits
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view(np.uint16), onnx.TensorProto.BFLOAT16
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def evaluate(engine: str, model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[NDArray[Any]]:
    """A model's outputs in ``onnxruntime`` or ``onnx.reference``."""
    if engine == "onnx.reference":
        return list(ReferenceEvaluator(model).run(None, dict(feeds)))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = {name: _ort_value(array) for name, array in feeds.items()}
    return [value.numpy() for value in session.run_with_ort_values(None, values)]


def in_onnx_reference(
    name: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any], opset: int = 20
) -> list[NDArray[Any]]:
    """The op's outputs by its ONNX body in onnx.reference."""
    feeds = {k: v for k, v in inputs.items() if v is not None}
    return list(_evaluator(*_key(name, inputs, attributes, opset)).run(None, feeds))


def expected(name: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> list[NDArray[Any]]:
    """The op's outputs by its float64 reference."""
    out = OPS[name].reference(**inputs, **OPS[name].complete(attributes))
    return list(out) if isinstance(out, tuple) else [out]


def problem(op: OpContract, dtype: str, got: NDArray[Any], want: NDArray[Any]) -> str:
    """Why ``got`` is not ``want``; empty when it is, within the contract's tolerance (integers: exactly)."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    if want.dtype.kind in "iu":
        wrong = np.argwhere(got != want)
        return f"{len(wrong)} integers differ, first at {wrong[0].tolist()}" if len(wrong) else ""
    if not got.size:
        return ""
    if not op.tolerance:
        wrong = np.argwhere(got.astype(np.float64) != want)
        return f"{len(wrong)} values differ, first at {wrong[0].tolist()}" if len(wrong) else ""
    bound: Tolerance = op.tolerance[dtype]
    scale = max(1.0, float(np.abs(want).max()))
    error = np.abs(got.astype(np.float64) - want) / scale
    if not np.isfinite(error).all():
        return "a difference is not finite"
    worst, rms = float(error.max()), float(np.sqrt((error**2).mean()))
    where = np.unravel_index(int(error.argmax()), error.shape)
    if worst > bound.max:
        return f"max error {worst:.3g} > {bound.max:.3g} at {[int(i) for i in where]}"
    return f"RMS error {rms:.3g} > {bound.rms:.3g}" if rms > bound.rms else ""


def assert_equal(name: str, dtype: str, got: list[NDArray[Any]], want: list[NDArray[Any]]) -> None:
    """Fail with the op, the output and the coordinates where ``got`` is outside the contract's tolerance."""
    assert len(got) == len(want)
    for param, a, b in zip(OPS[name].outputs, got, want, strict=True):
        found = problem(OPS[name], dtype, a, b)
        assert not found, f"{name}.{param.name} ({dtype}): {found}"
