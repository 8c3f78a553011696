"""One op of the domain by the CPU plugin's kernel in ONNX Runtime."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from moe_export.runtime.plugin import cpu_plugin_path, cpu_plugin_problem
from tests.ops.one_op import NUMPY, onnx_model


def plugin() -> Path:
    """The library; skips the test where it was switched off on purpose, and fails where it is missing."""
    if os.environ.get("MOE_EXPORT_CPU_PLUGIN") == "off":
        pytest.skip("switched off by MOE_EXPORT_CPU_PLUGIN=off")
    path = cpu_plugin_path()
    assert path is not None, cpu_plugin_problem()
    return path


def with_plugin(threads: int = 2) -> Any:
    """Session options with the plugin's kernels."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(plugin()))
    return options


def session(model: onnx.ModelProto, threads: int = 2) -> Any:
    """A session over ``model`` with the plugin's kernels."""
    return onnxruntime.InferenceSession(
        model.SerializeToString(), with_plugin(threads), providers=["CPUExecutionProvider"]
    )


@functools.cache
def _session(name: str, attributes: tuple[Any, ...], dtypes: tuple[Any, ...], threads: int) -> Any:
    model = onnx_model(name, dict(attributes), dict(dtypes), 20)
    # Without the body only a kernel can run it, and without ranks ONNX Runtime leaves their check to it.
    del model.functions[:]
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    return session(model, threads)


def one_op_session(
    name: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any], threads: int = 2
) -> Any:
    """A session with one node of op ``name`` for inputs of these dtypes."""
    dtypes = tuple((k, v.dtype.name) for k, v in inputs.items() if v is not None)
    return _session(name, tuple(sorted(attributes.items())), dtypes, threads)


def feeds(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs as ONNX Runtime takes them; None: left out."""
    return {name: _ort_value(array) for name, array in inputs.items() if array is not None}


def _ort_value(array: NDArray[Any]) -> Any:
    if array.dtype == NUMPY["bfloat16"]:  # ONNX Runtime takes it as its bits
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(array).view(np.uint16), onnx.TensorProto.BFLOAT16
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def in_kernel(
    name: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any], threads: int = 2
) -> list[NDArray[Any]]:
    """The op's outputs by its kernel."""
    running = one_op_session(name, inputs, attributes, threads)
    return [value.numpy() for value in running.run_with_ort_values(None, feeds(inputs))]


def refusal(name: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    """What ONNX Runtime says when the kernel refuses these inputs."""
    from moe_export.backends.onnxruntime.runner import ort_error_types

    with pytest.raises(ort_error_types()) as caught:
        in_kernel(name, inputs, attributes)
    return str(caught.value)
