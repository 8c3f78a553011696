"""TensorRT-RTX builds every native lowering for each SM that it has, with no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx.compose
import onnx.inliner
import pytest

from moe_export.backends.trt.child import run_builder
from moe_export.errors import BuildError
from moe_export.passes.native_text import NativeForm, uses_buckets
from tests.ops.cases import expert_ids, expert_inputs
from tests.passes.native_models import FORMS, form_of, io_of, model_of

pytest.importorskip("tensorrt_rtx", reason="pip install 'moe-export[tensorrt-rtx]'")

SMS = (80, 89, 120)
SIZES = {"T": (1, 8, 64), "C": (1, 8, 64)}


def joined(models: dict[str, onnx.ModelProto]) -> onnx.ModelProto:
    """Models side by side in one graph, their functions inlined, names prefixed."""
    whole: onnx.ModelProto | None = None
    for label, model in models.items():
        piece = onnx.compose.add_prefix(onnx.inliner.inline_local_functions(model), f"{label}.")
        whole = piece if whole is None else onnx.compose.merge_models(whole, piece, io_map=[])
    assert whole is not None
    return whole


def build(
    model: onnx.ModelProto,
    folder: Path,
    sms: tuple[int, ...] = SMS,
    sizes: Mapping[str, tuple[int, int, int]] | None = None,
) -> Any:
    """The engines of ``model``, with profiles of ``sizes`` by symbol."""
    spans = {**SIZES, **(sizes or {})}
    onnx.save(model, folder / "model.onnx")
    shapes, specs = {}, {"inputs": [], "outputs": []}
    for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        for value in values:
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
            specs[kind].append({"name": value.name, "dtype": dtype, "shape": dims})
            free = [d.rsplit(".", 1)[-1] if isinstance(d, str) else d for d in dims]
            if kind == "inputs" and any(isinstance(d, str) for d in free):
                shapes[value.name] = [[spans[d][i] if d in spans else d for d in free] for i in range(3)]
    recipe = {
        "library": "tensorrt_rtx",
        "model": "model.onnx",
        "sms": list(sms),
        "plans": {str(n): f"model.sm{n}.plan" for n in sms},
        "driver": "580",
        "profiles": [{"name": "all", "shapes": shapes}],
        "plugins": [],
        **specs,
    }
    return run_builder(recipe, folder)


def case(name: str, dtype: str) -> tuple[NativeForm, dict[str, tuple[int, ...]]]:
    ids = expert_ids(8, 2, 4)
    inputs = expert_inputs(FORMS[name], ids, 4, dtype, dtype)
    form = form_of(name, ids, 4, dtype)
    return form, {n: inputs[n].shape for n in form.inputs}


@pytest.mark.parametrize("lowering", ["both", "dense"])
def test_some_forms_build(lowering: str, tmp_path: Path) -> None:
    (engine,) = check_forms(("gpt-oss", "relu2 ungated"), lowering, "float16", (89,), tmp_path)
    assert uses_buckets(lowering) == any("jmp" in kind for kind in engine.layer_kinds)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("lowering", ["both", "dense"])
def test_every_form_builds_for_every_sm(lowering: str, dtype: str, tmp_path: Path) -> None:
    """``both`` holds gather and buckets."""
    check_forms(tuple(FORMS), lowering, dtype, SMS, tmp_path)


def check_forms(names: tuple[str, ...], lowering: str, dtype: str, sms: tuple[int, ...], folder: Path) -> Any:
    models = {}
    for number, name in enumerate(names):
        form, shapes = case(name, dtype)
        models[f"form{number}"] = model_of(form, lowering, shapes)
    engines = build(joined(models), folder, sms)
    assert [e.sm for e in engines] == list(sms)
    assert all((folder / e.file).stat().st_size > 0 for e in engines)
    return engines


def test_bfloat16_builds(tmp_path: Path) -> None:
    form, shapes = case("gpt-oss", "bfloat16")
    inputs, outputs = io_of(form, "both", shapes)
    assert {v.name for v in inputs} >= {"capacity", "hidden"} and outputs == ["out", "load"]
    (engine,) = build(joined({"layer": model_of(form, "both", shapes)}), tmp_path, (120,))
    assert engine.sm == 120


def test_a_form_that_tensorrt_cannot_build_is_refused(tmp_path: Path) -> None:
    """The op's own body, with its Loop over sequences: the check above can fail."""
    from tests.ops.one_op import onnx_model

    model = onnx_model("GroupedMatMul", {}, {"rows": "float32", "weight": "float32", "offsets": "int64"}, 20)
    plain = onnx.inliner.inline_local_functions(model)
    for value in plain.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, (8, 4, 6), strict=False):
            dim.dim_value = size
    with pytest.raises(BuildError, match="tensorrt_rtx"):
        build(plain, tmp_path, (89,))
    assert not list(tmp_path.glob("*.plan"))


def test_gathered_matrices_are_not_copied(tmp_path: Path) -> None:
    """Decode memory: 8 tokens of E64 H256 I128 K8 gather 50 MB of matrices; the plan needs far less."""
    from moe_export.ops import OPS

    attributes = OPS["ExpertMLP"].complete({"num_experts": 64})
    form = NativeForm(attributes, 8, 256, 128, "float16", "float16", drops=False)
    shapes = {
        "hidden": (8, 256),
        "expert_ids": (8, 8),
        "weights": (8, 8),
        "up": (64, 256, 256),
        "down": (64, 256, 128),
    }
    model = model_of(form, "gather", shapes)
    (engine,) = build(joined({"layer": model}), tmp_path, (89,), {"T": (1, 8, 8)})
    gathered = 8 * 8 * (256 * 256 + 256 * 128) * 2
    assert engine.activation_bytes < gathered / 10
    assert np.isfinite(engine.build_seconds)


def test_ops_one_by_one_build(tmp_path: Path) -> None:
    """A layer whose activation is none that moe-export knows."""
    import onnx_ir as ir

    from tests.passes.test_fuse_experts import OTHER
    from tests.passes.test_native_experts import lowered

    made = lowered(OTHER["a leak"])
    assert made.decisions[-1].choice == "native: op by op"
    sizes = {"tokens": (1, 8, 64), "capacity": (1, 16, 64)}
    (engine,) = build(ir.to_proto(made.model), tmp_path, (89,), sizes)
    assert engine.sm == 89
