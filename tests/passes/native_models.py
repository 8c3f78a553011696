"""Native lowerings of experts as models of their own, run in ONNX Runtime."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from moe_export.ops import OPS
from moe_export.passes.native_text import (
    CAPACITY,
    NATIVE_DOMAIN,
    NativeForm,
    native_function,
    uses_buckets,
)
from tests.ops.cases import EXPERTS
from tests.ops.one_op import NUMPY

OPSET = 20
THRESHOLD = 2
FORMS = {name: a for name, a in EXPERTS.items() if not a.get("packed")}
"""Every form of experts that a model's source has."""
_KINDS = {"expert_ids": onnx.TensorProto.INT32, CAPACITY: onnx.TensorProto.INT32, "weights": 1}


def form_of(
    name: str, ids: NDArray[np.int32], experts: int, dtype: str = "float32", stored: str | None = None
) -> NativeForm:
    """The form ``name`` of :data:`FORMS` with H = 6, I = 4, as ``tests.ops.cases.expert_inputs`` fills it."""
    attributes = OPS["ExpertMLP"].complete({**FORMS[name], "num_experts": experts})
    return NativeForm(attributes, ids.shape[1], 6, 4, dtype, stored or dtype, drops=True)


def rows_of(name: str) -> bool:
    return name in ("hidden", "expert_ids", "weights")


def io_of(
    form: NativeForm, lowering: str, shapes: Mapping[str, Sequence[int]]
) -> tuple[list[onnx.ValueInfoProto], list[str]]:
    """Inputs of a lowering (tokens and capacity free), and names of its outputs."""
    code = {n: int(helper.np_dtype_to_tensor_dtype(NUMPY[n])) for n in ("float32", "float16", "bfloat16")}
    inputs = []
    for name in form.inputs:
        kind = _KINDS.get(name) or code[form.dtype if name == "hidden" else form.weight_dtype]
        shape: list[Any] = list(shapes[name])
        inputs.append(
            helper.make_tensor_value_info(name, kind, ["T", *shape[1:]] if rows_of(name) else shape)
        )
    if not uses_buckets(lowering):
        return inputs, ["out"]
    return [*inputs, helper.make_tensor_value_info(CAPACITY, _KINDS[CAPACITY], ["C"])], ["out", "load"]


def model_of(form: NativeForm, lowering: str, shapes: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    inputs, outputs = io_of(form, lowering, shapes)
    kinds = {"out": helper.np_dtype_to_tensor_dtype(NUMPY[form.dtype]), "load": onnx.TensorProto.INT32}
    call = helper.make_node("experts", [v.name for v in inputs], outputs, domain=NATIVE_DOMAIN)
    results = [
        helper.make_tensor_value_info(n, int(kinds[n]), ["T", form.hidden] if n == "out" else [1])
        for n in outputs
    ]
    model = helper.make_model(
        helper.make_graph([call], "experts", inputs, results),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(NATIVE_DOMAIN, 1)],
        functions=[native_function(form, lowering, THRESHOLD, OPSET, "experts")],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@functools.lru_cache(maxsize=64)
def _session(serialised: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])


def run_native(
    form: NativeForm, lowering: str, inputs: Mapping[str, Any], capacity: int = 0
) -> tuple[NDArray[Any], int | None]:
    """The lowering's result, and its load where it has buckets."""
    arrays = {name: inputs[name] for name in form.inputs}
    if uses_buckets(lowering):
        arrays[CAPACITY] = np.zeros(capacity, np.int32)
    model = model_of(form, lowering, {name: array.shape for name, array in arrays.items()})
    session = _session(model.SerializeToString())
    out, *load = session.run(None, arrays)
    return out, int(load[0][0]) if load else None
