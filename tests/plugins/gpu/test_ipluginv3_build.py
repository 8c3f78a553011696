"""Engines that hold the plugin, built by the real TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import pytest
from moe_export_plugins.gpu.experts import ExpertShape, scratch_bytes, tile_sets
from onnx import TensorProto, numpy_helper

from moe_export.graph.functions import PLUGIN_ATTRIBUTES
from moe_export.ops import DOMAIN, OPS

from .rtx_child import build

pytest.importorskip("tensorrt_rtx", reason="pip install 'moe-export[tensorrt-rtx]'")
E, K, H, INNER = 8, 2, 64, 48
ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
TOKENS = 256
PROFILE = {n: [[0, w], [16, w], [TOKENS, w]] for n, w in (("hidden", H), ("expert_ids", K), ("weights", K))}


def model(folder: Path, dtype: str, **form: Any) -> Path:
    """One node between network inputs, its weights as constants, its body as a function."""
    attributes = OPS["ExpertMLP"].complete({"num_experts": E, "layer": "model.layers.0", **form})
    kind = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}.get(dtype, dtype)
    rng = np.random.default_rng(0)
    width = INNER * (2 if attributes["gated"] else 1)
    stored = {"up": (E, width, H), "down": (E, H, INNER)}
    if attributes["biased"]:
        stored |= {"up_bias": (E, width), "down_bias": (E, H)}
    arrays = {n: rng.standard_normal(s).astype(kind) for n, s in stored.items()}
    inputs = ["hidden", "expert_ids", "weights", *arrays]
    node = onnx.helper.make_node(
        "ExpertMLP", inputs, ["out"], "experts", domain=DOMAIN, **attributes, **PLUGIN_ATTRIBUTES
    )
    info, element = onnx.helper.make_tensor_value_info, ELEMENTS[dtype]
    graph = onnx.helper.make_graph(
        [node],
        "experts",
        [
            info("hidden", element, ["T", H]),
            info("expert_ids", TensorProto.INT32, ["T", K]),
            info("weights", TensorProto.FLOAT, ["T", K]),
        ],
        [info("out", element, ["T", H])],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    bodies = [
        ("Dispatch", {"num_experts": E}),
        ("GroupedMatMul", {}),
        ("Combine", {}),
        ("ExpertMLP", attributes),
    ]
    made = onnx.helper.make_model(
        graph,
        functions=[OPS[n].function(a, 20) for n, a in bodies],
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    path = folder / "model.onnx"
    onnx.save(made, path)
    return path


def test_engines_for_three_sms(tmp_path: Path) -> None:
    found = build(model(tmp_path, "float16"), [80, 89, 120], PROFILE)
    assert found["parsed"] and found["errors"] == []
    assert found["layers"].count("PLUGIN_V3") == 1
    # Weights, and the plugin's attributes, are in the plan; kernels are not: they lie in the bundle.
    for plan in found["plans"].values():
        assert plan["bytes"] > 2 * (2 * E * H * INNER) and plan["names"] == ["ExpertMLP", "model.layers.0"]
    assert set(found["plans"]) == {"80", "89", "120"}
    shape = ExpertShape("float16", E, K, H, INNER)
    assert set(found["workspace"]) == {scratch_bytes(shape, TOKENS)}
    assert found["tactics"][0] == list(range(1, 2 + len(tile_sets("float16"))))
    # TensorRT sets the workspace aside.
    assert max(found["memory"]) >= scratch_bytes(shape, TOKENS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_and_forms(dtype: str, tmp_path: Path) -> None:
    form = (
        {"activation": "clamped_swiglu", "layout": "interleaved", "biased": 1} if dtype == "bfloat16" else {}
    )
    form = form or {"activation": "relu2", "gated": 0}
    found = build(model(tmp_path, dtype, **form), [120], PROFILE)
    assert found["layers"].count("PLUGIN_V3") == 1 and found["plans"]["120"]["bytes"] > 0
    assert ("clamped_swiglu" in found["plans"]["120"]["names"]) == (dtype == "bfloat16")


def test_without_the_plugin_the_parser_takes_the_body_and_says_what_it_cannot(tmp_path: Path) -> None:
    found = build(model(tmp_path, "float16"), [89], PROFILE, plugin=False)
    assert not found["parsed"] and found["errors"] and "PLUGIN_V3" not in found["layers"]


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("packed", 1, "layer 'model.layers.0' has weights packed for the CPU plugin"),
        ("num_experts", 9, r"up is (8, 96, 64); expected (9, 96, 64)"),
    ],
)
def test_what_the_plugin_refuses_is_told(attribute: str, value: int, reason: str, tmp_path: Path) -> None:
    path = model(tmp_path, "float16")
    proto = onnx.load(path)
    next(a for a in proto.graph.node[0].attribute if a.name == attribute).i = value
    onnx.save(proto, path)
    found = build(path, [89], PROFILE)
    assert found["plans"]["89"]["bytes"] == 0
    (problem,) = found["problems"]
    assert reason in problem
