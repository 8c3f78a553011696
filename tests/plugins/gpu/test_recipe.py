"""The GPU plugin in a recipe: kernels in the bundle, which model is parsed, and refusals in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe_export_plugins.gpu.bundle_kernels as bundle_kernels
import onnx
import pytest
from moe_export_plugins.gpu.experts import ExpertShape
from moe_export_plugins.gpu.library import INDEX, KernelLibrary

from moe_export.backends.base import MODEL_FILE, write_onnx
from moe_export.backends.trt.build_engine import CannotBuild, _load_plugins
from moe_export.backends.trt.child import run_builder
from moe_export.backends.trt.kernels import AHEAD_OF_TIME, MODULE, write_plugin_kernels
from moe_export.errors import BuildError
from moe_export.passes.plugin_experts import PluginExperts

from ...passes.moe_graphs import EXPERTS, HIDDEN, INNER, TOP_K, one_layer
from .memory_launcher import stand_in_library
from .test_ipluginv3_build import PROFILE, H, K, model


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, specs: Any, sms: Any) -> tuple[str, ...]:
        return (str(stand_in_library(folder, specs, sms).folder / INDEX),)

    monkeypatch.setattr(bundle_kernels, "write_kernels", write)


def lowered(folder: Path, lowering: str = "plugin") -> Any:
    context = one_layer()
    context.options = {"expert_lowering": lowering}
    PluginExperts().apply(context)
    write_onnx(context, folder)
    return context


def test_rtx_parses_the_model_and_finds_its_kernels(written: None, tmp_path: Path) -> None:
    context = lowered(tmp_path)
    assert write_plugin_kernels(context, tmp_path, (80, 120)) == {"plugins": [MODULE], "kernels": "kernels"}
    library = KernelLibrary.load(tmp_path / "kernels")
    assert library.sms == (80, 120)
    shape = ExpertShape("float32", EXPERTS, TOP_K, HIDDEN, INNER, activation="relu", gated=0)
    for spec in bundle_kernels.expert_specs(shape):
        library.cubin(spec.kernel, spec.dtype, spec.constants, spec.tile, 86)
    assert "kernels in kernels/" in context.decisions[-1].choice


def test_standard_tensorrt_parses_the_model_with_one_node_per_kernel(written: None, tmp_path: Path) -> None:
    told = write_plugin_kernels(lowered(tmp_path), tmp_path, (89,), 64)
    assert told == {"plugins": [AHEAD_OF_TIME], "kernels": "kernels", "model": "model.aot.onnx"}
    parsed = onnx.load(tmp_path / told["model"], load_external_data=False)
    names = [n.op_type for n in parsed.graph.node if n.domain == "moe_export_gpu"]
    assert names == ["Dispatch", "GateUp", "Down", "Combine"]
    plain = onnx.load(tmp_path / MODEL_FILE, load_external_data=False)
    assert [n.op_type for n in plain.graph.node if n.domain == "moe_export"] == ["ExpertMLP"]
    # Both read the same weights.
    assert {t.name for t in parsed.graph.initializer} == {t.name for t in plain.graph.initializer}


def test_nothing_for_a_model_without_the_plugin(tmp_path: Path) -> None:
    assert write_plugin_kernels(lowered(tmp_path, "auto"), tmp_path, (89,)) == {}
    assert not (tmp_path / "kernels").exists()


def test_a_plugin_that_cannot_be_registered_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CannotBuild, match="aot_graph cannot be registered: .*kernels.json is missing"):
        _load_plugins(AHEAD_OF_TIME, tmp_path, tmp_path / "kernels", None)
    with pytest.raises(CannotBuild, match="cannot be imported .*pip install moe-export"):
        _load_plugins("moe_export_plugins.gpu.nothing", tmp_path, tmp_path, None)


def test_what_the_plugin_refuses_ends_the_build_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'moe-export[tensorrt-rtx]'")
    path = model(tmp_path, "float16")
    stand_in_library(tmp_path / "kernels", bundle_kernels.expert_specs(ExpertShape("float16", 8, K, H, 48)))
    proto = onnx.load(path)
    next(a for a in proto.graph.node[0].attribute if a.name == "num_experts").i = 9
    onnx.save(proto, path)
    tensors = {"hidden": ("float16", H), "expert_ids": ("int32", K), "weights": ("float32", K)}
    recipe = {
        "library": "tensorrt_rtx",
        "model": path.name,
        "sms": [89],
        "plans": {"89": "model.sm89.plan"},
        "driver": "580",
        "profiles": [{"name": "all", "shapes": PROFILE}],
        "inputs": [{"name": n, "dtype": d, "shape": ["T", w]} for n, (d, w) in tensors.items()],
        "outputs": [{"name": "out", "dtype": "float16", "shape": ["T", H]}],
        "plugins": [MODULE],
        "kernels": "kernels",
    }
    with pytest.raises(
        BuildError, match=r"no plan for SM89: plugin ExpertMLP: up is \(8, 96, 64\); expected"
    ):
        run_builder(recipe, tmp_path)
