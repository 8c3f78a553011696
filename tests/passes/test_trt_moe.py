"""TensorRT's own MoE layer: the node's contract, its body, the limits. No machine here builds or runs it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from moe_export.backends import get_backend
from moe_export.backends.trt import build_engine
from moe_export.config import NATIVE_LOWERINGS
from moe_export.errors import UsageError
from moe_export.ops import OPS
from moe_export.passes import trt_moe
from moe_export.passes.base import PassContext
from moe_export.passes.bfloat16_products import BFloat16Products
from moe_export.passes.inline_bodies import InlineBodies
from moe_export.passes.native_choice import choose
from moe_export.passes.native_experts import NativeExperts
from moe_export.passes.native_text import LOWERINGS, NativeForm
from tests.backends.trt.small import recipe
from tests.ops.cases import expert_ids, expert_inputs

from .moe_graphs import run, tokens
from .native_models import FORMS, OPSET, _session, form_of
from .test_fuse_experts import KNOWN, context

NUMPY: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CODES = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
BOUNDS = {"float16": 2e-3, "bfloat16": 1.2e-2}
IDS = expert_ids(7, 2, 4, strangers=False)


def lowered(
    name: str = "silu", dtype: str = "bfloat16", sms: tuple[int, ...] = (100, 103), **form: Any
) -> PassContext:
    """A float32 graph whose products are to be in ``dtype``, as builds in bfloat16 give it."""
    made = context(KNOWN[name][0], gated=True, **form)
    made.dtype = dtype
    made.options = {"native_lowering": "trt_moe", "sm": sms}
    NativeExperts().apply(made)
    return made


def node_model(
    dtype: str, experts: int, inner: int, hidden: int, top_k: int, sequences: int = 1
) -> onnx.ModelProto:
    """The node alone, its matrices as inputs."""
    shapes: dict[str, list[Any]] = {
        "tokens": [sequences, "S", hidden],
        "ids": [sequences, "S", top_k],
        "scores": [sequences, "S", top_k],
        "gate": [experts, hidden, inner],
        "up": [experts, hidden, inner],
        "down": [experts, inner, hidden],
    }
    inputs = [
        helper.make_tensor_value_info(n, onnx.TensorProto.INT32 if n == "ids" else CODES[dtype], shape)
        for n, shape in shapes.items()
    ]
    node = helper.make_node(
        trt_moe.OP, list(shapes), ["out"], "moe", domain=trt_moe.DOMAIN, activation_type=trt_moe.SILU
    )
    out = helper.make_tensor_value_info("out", CODES[dtype], shapes["tokens"])
    model = helper.make_model(
        helper.make_graph([node], "moe", inputs, [out]),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(trt_moe.DOMAIN, 1)],
        functions=[trt_moe.body(OPSET)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def node_inputs(dtype: str) -> tuple[dict[str, Any], np.ndarray]:
    """The node's inputs in ``dtype``, and ExpertMLP's float64 reference of the same numbers."""
    given = expert_inputs(FORMS["swiglu"], IDS, 4, "float32", "float32")
    given = {
        k: v if k == "expert_ids" else v.astype(NUMPY[dtype]).astype(np.float32)
        for k, v in given.items()
        if v is not None
    }
    attributes = OPS["ExpertMLP"].complete({**FORMS["swiglu"], "num_experts": 4})
    want = np.asarray(OPS["ExpertMLP"].reference(**given, **attributes))
    up, down = given["up"].swapaxes(1, 2), given["down"].swapaxes(1, 2)
    inner = down.shape[1]
    arrays = {
        "tokens": given["hidden"][None],
        "ids": given["expert_ids"][None],
        "scores": given["weights"][None],
        "gate": up[:, :, :inner],
        "up": up[:, :, inner:],
        "down": down,
    }
    return {
        k: v if k == "ids" else np.ascontiguousarray(v, dtype=NUMPY[dtype]) for k, v in arrays.items()
    }, want


def run_node(dtype: str, feeds: dict[str, Any], sequences: int = 1) -> np.ndarray:
    """In ONNX Runtime; bfloat16 goes in and out as float32, since its Python interface has none."""
    model = node_model(dtype, 4, feeds["down"].shape[1], feeds["down"].shape[2], 2, sequences)
    if dtype == "bfloat16":
        casts = []
        for value in model.graph.input:
            if value.name != "ids":
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
                casts.append(helper.make_node("Cast", [value.name], [f"{value.name}.t"], to=CODES[dtype]))
        (node,) = model.graph.node
        node.input[:] = [n if n == "ids" else f"{n}.t" for n in node.input]
        node.output[0] = "out.t"
        back = helper.make_node("Cast", ["out.t"], ["out"], to=onnx.TensorProto.FLOAT)
        call = onnx.NodeProto.FromString(node.SerializeToString())
        del model.graph.node[:]
        model.graph.node.extend([*casts, call, back])
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        feeds = {k: v if k == "ids" else v.astype(np.float32) for k, v in feeds.items()}
    (out,) = _session(model.SerializeToString()).run(None, feeds)
    return np.asarray(out, np.float64)


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.reshape(want.shape) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("dtype", trt_moe.DTYPES)
def test_the_body_is_the_ops_reference(dtype: str) -> None:
    feeds, want = node_inputs(dtype)
    assert error(run_node(dtype, feeds), want) < BOUNDS[dtype]
    swapped = {**feeds, "gate": feeds["up"], "up": feeds["gate"]}
    assert error(run_node(dtype, swapped), want) > 10 * BOUNDS[dtype]


def test_several_sequences_and_experts_nobody_chose() -> None:
    feeds, want = node_inputs("float16")
    for name in ("tokens", "ids", "scores"):
        feeds[name] = np.concatenate([feeds[name], feeds[name][:, ::-1]])
    feeds["ids"] = np.where(feeds["ids"] == 3, 2, feeds["ids"])
    plain = run_node("float16", feeds, 2)
    np.testing.assert_array_equal(plain[0], plain[1][::-1])
    feeds["down"] = feeds["down"].copy()
    feeds["down"][3] = np.inf
    np.testing.assert_array_equal(run_node("float16", feeds, 2), plain)
    assert want.shape == plain[0].shape


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("name", ["silu", "silu, interleaved"])
def test_a_layer_keeps_its_numbers(name: str, transposed: int) -> None:
    made = lowered(name, transposed=transposed)
    assert made.fused == (0,) and made.decisions[-1].choice.startswith("native: TRT_MoE")
    assert trt_moe.count(made.model) == 1
    assert "not run on a GPU" in made.decisions[-1].reason
    assert {s.role for s in (*made.io.inputs, *made.io.outputs)} <= {"data"}
    InlineBodies().apply(made)
    BFloat16Products().apply(made)
    (node,) = [n for n in made.model.graph if n.op_type == trt_moe.OP]
    matrices = [v.const_value for v in node.inputs[3:] if v is not None]
    assert [m.dtype for m in matrices if m is not None] == [ir.DataType.BFLOAT16] * 3
    left = set(made.model.graph.initializers)
    assert {"moe.0.experts.gate", "moe.0.experts.up", "moe.0.experts.down"} <= left
    assert not {n for n in left if n.startswith(("up_0", "down_0"))}
    for count in (1, 7, 40):
        hidden = tokens(count)
        (want,) = run(context(KNOWN[name][0], gated=True, transposed=transposed).model, hidden, ("out",))
        (got,) = _session(ir.to_proto(made.model).SerializeToString()).run(["out"], {"hidden": hidden})
        assert error(np.asarray(got, np.float64), np.asarray(want, np.float64)) < 3 * BOUNDS["bfloat16"]


def form(**changes: Any) -> NativeForm:
    base = form_of("swiglu", expert_ids(1, 8, 64), 64, "float16")
    made = NativeForm(base.attributes, 8, 2048, 1024, "float16", "float16", False, "float16")
    attributes = {**made.attributes, **changes.pop("attributes", {})}
    return dataclasses.replace(made, attributes=attributes, **changes)


REFUSED: dict[str, tuple[NativeForm, tuple[int, ...], str]] = {
    "another SM": (form(), (90, 100), "SM100, SM103 and SM110, not on SM90"),
    "an SM of the RTX target": (form(), (120,), "not on SM120"),
    "no SM": (form(), (), "no SM was named"),
    "GELU": (form(attributes={"activation": "gelu"}), (100,), "SiLU-gated experts; these are gated, gelu"),
    "no gate": (form(attributes={"gated": 0}), (100,), "these are ungated, silu"),
    "biases": (form(attributes={"biased": 1}), (100,), "without biases"),
    "float32": (form(computed="float32"), (100,), "float16 and bfloat16, and products here are float32"),
    "drops": (form(drops=True), (100,), "drop assignments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_limit_is_refused_and_auto_takes_another(name: str) -> None:
    given, sms, text = REFUSED[name]
    with pytest.raises(UsageError, match="native_lowering: trt_moe is not for layer") as caught:
        choose(given, "trt_moe", sms, None)
    assert text in str(caught.value)
    found = choose(given, "auto", sms, 1)
    assert found.lowering != "trt_moe"
    assert text in next(a.reason for a in found.alternatives if a.choice == "TRT_MoE")


def test_auto_takes_it_only_where_no_run_is_too_long_for_it() -> None:
    short = choose(form(), "auto", (100, 103), 16)
    assert short.lowering == "trt_moe" and "not run on a GPU" in short.reason and "predicted" in short.reason
    assert "TRT_MoE" not in {a.choice for a in short.alternatives}
    for most in (17, None):
        other = choose(form(), "auto", (100, 103), most)
        assert other.lowering != "trt_moe"
        reason = next(a.reason for a in other.alternatives if a.choice == "TRT_MoE")
        assert "slow for more than 16 tokens" in reason and "not run on a GPU" in reason
    assert choose(form(), "trt_moe", (100, 110), None).reason.startswith("asked for")


PARSE = """
import sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse(sys.stdin.buffer.read()):
    sys.exit(parser.get_error(0).desc())
layers = [network.get_layer(i) for i in range(network.num_layers)]
for layer in layers:
    layer.__class__ = trt.IMoELayer if layer.type == trt.LayerType.MOE else layer.__class__
for moe in (layer for layer in layers if layer.type == trt.LayerType.MOE):
    names = [moe.get_input(i).name for i in range(moe.num_inputs)]
    print(len(layers), moe.name, moe.activation_type.name, tuple(moe.get_output(0).shape), *names)
"""


def parsed(model: onnx.ModelProto) -> subprocess.CompletedProcess[bytes]:
    pytest.importorskip("tensorrt_rtx")
    return subprocess.run(
        [sys.executable, "-c", PARSE],
        input=model.SerializeToString(),
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("dtype", trt_moe.DTYPES)
def test_tensorrts_own_parser_makes_the_node_its_moe_layer(dtype: str) -> None:
    """Although the model holds a function of its name, and with every input in its place."""
    done = parsed(node_model(dtype, 4, 8, 16, 2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split("\n")[0] == "1 moe SILU (1, -1, 16) tokens ids scores gate up down"


def test_tensorrts_own_parser_refuses_another_contract() -> None:
    model = node_model("float16", 4, 8, 16, 2)
    model.graph.node[0].attribute[0].i = 2
    done = parsed(model)
    assert done.returncode != 0 and b"activation_type must be 0 (kNONE) or 1 (kSILU)" in done.stderr
    model = node_model("float16", 4, 8, 16, 2)
    del model.graph.node[0].input[5:]
    done = parsed(model)
    assert done.returncode != 0 and b"TRT_MoE requires 6 to 10 inputs" in done.stderr


def test_the_builder_makes_sure_of_it(tmp_path: Path) -> None:
    """A parser that took the node's function instead would build a slow engine without a word."""
    pytest.importorskip("tensorrt_rtx")
    model = node_model("float16", 4, 8, 16, 2)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    for layers, text in ((2, "2 TRT_MoE nodes, and the parser made 1"), (1, "no plan for SM120")):
        shapes = {"tokens": [1, 4, 16], "ids": [1, 4, 2], "scores": [1, 4, 2], "gate": [4, 16, 8]}
        shapes |= {"up": [4, 16, 8], "down": [4, 8, 16]}
        inputs = [
            {"name": n, "dtype": "int32" if n == "ids" else "float16", "shape": s} for n, s in shapes.items()
        ]
        outputs = [{"name": "out", "dtype": "float16", "shape": shapes["tokens"]}]
        profile = {"name": "all", "shapes": {n: [s, s, s] for n, s in shapes.items()}}
        changes = {"profiles": [profile], "inputs": inputs, "outputs": outputs, "moe_layers": layers}
        (tmp_path / build_engine.RECIPE).write_text(json.dumps(recipe([120], **changes)))
        shutil.copy(build_engine.__file__, tmp_path)
        done = subprocess.run(
            [sys.executable, "build_engine.py"], cwd=tmp_path, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 1 and text in (done.stdout + done.stderr).decode(), done.stderr


@pytest.mark.parametrize(
    ("sms", "dtype", "text"),
    [((90, 100), "float16", "not on SM90"), ((100,), "float32", "products here are float32")],
)
def test_what_no_layer_can_be_is_refused_before_any_work(sms: tuple[int, ...], dtype: str, text: str) -> None:
    options = {"sm": sms, "dtype": dtype, "native_lowering": "trt_moe"}
    with pytest.raises(UsageError, match=f"native_lowering: trt_moe: .*{text}; take auto"):
        get_backend("tensorrt").environment(options)
    assert get_backend("tensorrt").environment({**options, "sm": (100, 103), "dtype": "float16"})["sm"] == [
        100,
        103,
    ]


def test_the_configuration_names_every_form() -> None:
    assert ("auto", *LOWERINGS, trt_moe.LOWERING) == NATIVE_LOWERINGS
