"""A network of one product that TensorRT builds in a second, and recipes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CODES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_network(folder: Path, dtype: str = "float32", op: str = "Relu") -> None:
    """``y = op(x @ w)`` with ``x`` [rows, 16]."""
    weight = np.linspace(-1, 1, 16 * 8).reshape(16, 8).astype(TYPES[dtype])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node(op, ["p"], ["y"], name="last")],
        "small",
        [helper.make_tensor_value_info("x", CODES[dtype], ["rows", 16])],
        [helper.make_tensor_value_info("y", CODES[dtype], ["rows", 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        folder / "model.onnx",
    )


def recipe(sms: list[int], dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """What ``build_engine.json`` holds for :func:`write_network`."""
    return {
        "library": "tensorrt_rtx",
        "model": "model.onnx",
        "sms": sms,
        "plans": {str(sm): f"model.sm{sm}.plan" for sm in sms},
        "driver": "580",
        "profiles": [{"name": "all", "shapes": {"x": [[1, 16], [4, 16], [64, 16]]}}],
        "inputs": [{"name": "x", "dtype": dtype, "shape": ["rows", 16]}],
        "outputs": [{"name": "y", "dtype": dtype, "shape": ["rows", 8]}],
        "plugins": [],
        **changes,
    }
