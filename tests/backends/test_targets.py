"""Every target and dtype of one small Mixtral, exported once: logits, cache and routing against the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import moe_export
from moe_export.backends import BACKENDS, get_backend
from moe_export.backends.base import DATA_FILE, MODEL_FILE, Backend
from moe_export.backends.onnxruntime.runner import create_session
from moe_export.errors import EnvironmentLacksError, ExportError, UsageError
from moe_export.importer.export import ExportedModel, export_model
from moe_export.importer.sources import load_source
from moe_export.models.families import tiny_model
from moe_export.models.reference import ReferenceModel
from moe_export.passes.pipelines import PIPELINES
from tests.helpers.one_export import one_export

torch.set_num_threads(1)
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.15, "float16": 0.1}
"""Of logits up to 3: bfloat16 and float16 round the weights; near ties are not asked of here."""
SAME_ROUTING = {"float32": 1.0, "bfloat16": 0.9, "float16": 0.9}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def exported(model: torch.nn.Module) -> ExportedModel:
    return export_model(model)


@pytest.fixture
def reused(exported: ExportedModel) -> Iterator[None]:
    with one_export(exported):
        yield


def ids_of(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(3, 127, (batch, length))


def compare(bundle: Path, model: torch.nn.Module, dtype: str) -> None:
    reference = ReferenceModel(load_source(model))
    same = total = 0
    with moe_export.load(bundle, threads=1) as session:
        for batch, length, chunks in ((1, 1, [1]), (2, 13, [13]), (3, 9, [4, 1, 1, 3])):
            ids = ids_of(batch, length)
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            want = reference.run(feeds)
            got = session.chunked_logits(ids, np.ones_like(ids), chunks)
            scale = max(1.0, float(np.abs(want.outputs["logits"]).max()))
            error = np.abs(got.outputs["logits"] - want.outputs["logits"]).max()
            assert error <= TOLERANCE[dtype] * scale, (chunks, error)
            if len(chunks) > 1:
                continue
            for ours, theirs in zip(session.run_traced(feeds).layers, want.layers, strict=True):
                assert ours.logits is not None and ours.name == theirs.name
                same += int((np.sort(ours.expert_ids) == np.sort(theirs.expert_ids)).all(axis=1).sum())
                total += len(ours.expert_ids)
    assert same >= SAME_ROUTING[dtype] * total


@pytest.mark.usefixtures("reused")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_each_target_computes_what_the_model_does(
    model: torch.nn.Module, tmp_path: Path, target: str, dtype: str
) -> None:
    bundle = moe_export.build(
        model,
        tmp_path / "b",
        target=target,
        dtype=dtype,
        verify=False,
        bench=False,
        threads=1,
        expert_lowering="unrolled",
    )
    manifest = bundle.manifest
    assert (manifest.target, manifest.dtype) == (target, dtype)
    assert all(layer.router is not None for layer in manifest.moe_layers)
    assert manifest.parameters["total"] == sum(p.numel() for p in model.parameters())
    compare(bundle.path, model, dtype)
    proto = onnx.load(bundle.path / MODEL_FILE, load_external_data=False)
    used = {n.domain for n in proto.graph.node} | {n.domain for f in proto.functions for n in f.node}
    assert used <= {o.domain for o in proto.opset_import}
    assert all(not n.metadata_props and not n.doc_string for n in proto.graph.node)
    stored = {onnx.TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer}
    assert ("BFLOAT16" in stored) == (dtype == "bfloat16")
    if dtype == "bfloat16":
        assert any("stored in bfloat16" in note for note in manifest.notes)
    if target == "portable":
        onnx.checker.check_model(str(bundle.path / MODEL_FILE), full_check=True)
        assert used == {"", "moe_export"}
        assert {f.name for f in proto.functions} == {"Router", "Dispatch", "GroupedMatMul", "Combine"}


@pytest.mark.slow
def test_float16(model: torch.nn.Module, tmp_path: Path) -> None:
    bundle = moe_export.build(model, tmp_path / "b", dtype="float16", bench=False, threads=1)
    assert bundle.manifest.evidence["parity"]["passed"]
    compare(bundle.path, model, "float16")


def test_the_export_names_every_value_and_dimension(exported: ExportedModel) -> None:
    assert [s.name for s in exported.io.inputs] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past.{layer}.{name}" for layer in (0, 1) for name in ("key", "value")),
    ]
    assert [s.name for s in exported.io.outputs] == [
        "logits",
        *(f"present.{layer}.{name}" for layer in (0, 1) for name in ("key", "value")),
    ]
    assert exported.io.outputs[1].shape == ("batch", 2, "total", 8)
    assert [layer.name for layer in exported.moe_layers] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    for layer in exported.moe_layers:
        assert (layer.num_experts, layer.top_k, layer.hidden_size) == (4, 2, 32)


def test_the_model_is_as_it_was(model: torch.nn.Module, exported: ExportedModel) -> None:
    fresh = tiny_model("mixtral")
    assert exported.source.module is model
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.get_experts_implementation() == fresh.get_experts_implementation()
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in fresh.modules()]


@pytest.mark.usefixtures("reused")
def test_an_unchanged_build_of_an_instance_is_a_cache_hit_and_another_config_is_not(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"verify": False, "bench": False, "target": "portable"}
    first = moe_export.build(model, tmp_path / "b", **options)
    assert moe_export.build(model, tmp_path / "b", **options).manifest == first.manifest
    other = tiny_model("mixtral")
    other.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(UsageError, match="exists already"):
        moe_export.build(other, tmp_path / "b", **options)


def test_every_backend_has_a_pipeline_and_says_what_it_is() -> None:
    assert set(BACKENDS) == set(PIPELINES)
    for name, backend in BACKENDS.items():
        assert backend.name == name and get_backend(name) is backend
        assert isinstance(backend, Backend) and backend.summary
    with pytest.raises(UsageError, match="unknown target .tensorr.; nearest: tensorrt"):
        get_backend("tensorr")


def test_a_portable_model_that_is_not_valid_is_refused(exported: ExportedModel, tmp_path: Path) -> None:
    broken = exported.model.clone()
    softmax = next(n for n in broken.graph if n.op_type == "MatMul")
    softmax.op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match="the written model is not valid ONNX.*NoSuchOperator"):
        get_backend("portable").build(dataclasses.replace(exported, model=broken), tmp_path, {})


def test_weights_lie_beside_the_model(exported: ExportedModel, tmp_path: Path) -> None:
    copy = dataclasses.replace(exported, model=exported.model.clone())
    lowered = get_backend("portable").build(copy, tmp_path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [MODEL_FILE, DATA_FILE]
    assert (tmp_path / MODEL_FILE).stat().st_size < 200_000
    assert [layer.logits for layer in lowered.moe_layers] == ["moe.0.logits", "moe.1.logits"]
    create_session(tmp_path / MODEL_FILE, threads=1)


@pytest.mark.parametrize(
    "wanted",
    [
        {"expert_lowering": "fused"},
        {"expert_weights": "packed"},
        {"quantize": "int8", "quantized_lowering": "plugin"},
    ],
)
def test_what_needs_the_plugin_is_refused_without_it(
    wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend("onnxruntime")
    assert backend._options(wanted)["fused_experts"]
    monkeypatch.setenv("MOE_EXPORT_CPU_PLUGIN", "off")
    assert not backend._options({})["fused_experts"]
    with pytest.raises(EnvironmentLacksError, match="needs the CPU plugin: switched off"):
        backend._options(wanted)
