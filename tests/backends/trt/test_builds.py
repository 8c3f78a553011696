"""Whole models for the TensorRT targets: real plans without a GPU, the recipe that finishes them, what is
refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

import moe_export
from moe_export.backends.trt.build_engine import gpu_sm
from moe_export.backends.trt.device import DeviceArray
from moe_export.bundle import open_bundle
from moe_export.cli.main import cli
from moe_export.errors import EnvironmentLacksError, InputError, UsageError
from moe_export.importer.export import ExportedModel, export_model
from moe_export.importer.sources import load_source
from moe_export.models.families import tiny_model
from moe_export.models.reference import ReferenceModel
from moe_export.runtime.gpu import GpuEngine, GpuStepper, NoTraces
from moe_export.schema import Manifest
from tests.helpers.one_export import one_export

torch.set_num_threads(1)
without_gpu = pytest.mark.skipif(gpu_sm() is not None, reason="a machine without a GPU is what it is about")
OPTIONS: dict[str, Any] = {"bench": False, "threads": 1, "max_batch": 3, "max_sequence": 32}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def exported(model: torch.nn.Module) -> ExportedModel:
    return export_model(model)


@pytest.fixture(scope="module", autouse=True)
def reused(exported: ExportedModel) -> Iterator[None]:
    with one_export(exported):
        yield


@pytest.fixture(scope="module")
def rtx(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for two SMs in bfloat16, verified by simulation."""
    folder = tmp_path_factory.mktemp("rtx") / "b"
    moe_export.build(model, folder, target="tensorrt-rtx", sm=(80, 120), dtype="bfloat16", **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def left(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for standard TensorRT, without the GPU."""
    folder = tmp_path_factory.mktemp("left") / "b"
    moe_export.build(model, folder, target="tensorrt", sm=(89,), verify=False, **OPTIONS)
    return folder


def test_a_bundle_with_plans(rtx: Path) -> None:
    bundle = open_bundle(rtx)
    manifest = bundle.manifest
    assert (manifest.state, manifest.sm, manifest.target) == ("ready", (80, 120), "tensorrt-rtx")
    assert [e.file for e in manifest.engines] == ["model.sm80.plan", "model.sm120.plan"]
    listed = {f.path for f in manifest.files}
    assert {"model.onnx", "model.sm80.plan", "evidence/model.sm80.plan.layers.json"} <= listed
    assert "build_engine.py" not in listed, "nothing is left to do"
    parity = manifest.evidence["parity"]
    assert parity["passed"] and parity["simulated"]
    assert "bench" not in manifest.evidence
    assert any("not measured" in note for note in manifest.notes)
    assert any("no plan ran on a GPU" in note for note in manifest.notes)
    assert all("not run on a GPU" in d.reason for d in manifest.decisions if d.subject.startswith("plan for"))
    layers = [d for d in manifest.decisions if d.subject.endswith(": experts")]
    assert len(layers) == len(manifest.moe_layers) and all(d.reason and d.alternatives for d in layers)
    stored = onnx.load(bundle.model_path, load_external_data=False).graph.initializer
    assert onnx.TensorProto.BFLOAT16 in {t.data_type for t in stored}


@without_gpu
def test_loading_without_a_gpu_is_refused_in_one_line(rtx: Path) -> None:
    with pytest.raises(
        EnvironmentLacksError, match="SM120, and this machine has none; .*--simulate"
    ) as caught:
        moe_export.load(rtx)
    assert "\n" not in str(caught.value)
    assert CliRunner().invoke(cli, ["run", str(rtx), "--prompt", "hello"]).exit_code == 3


def test_an_unchanged_build_is_a_cache_hit(model: torch.nn.Module, rtx: Path) -> None:
    before = (rtx / "manifest.json").read_bytes()
    options = {**OPTIONS, "target": "tensorrt-rtx", "dtype": "bfloat16"}
    moe_export.build(model, rtx, sm=(120, 80), **options)
    assert (rtx / "manifest.json").read_bytes() == before
    with pytest.raises(UsageError, match="exists already"):
        moe_export.build(model, rtx, sm=(80,), **options)


@without_gpu
def test_standard_tensorrt_without_its_gpu_is_no_finished_engine(left: Path) -> None:
    manifest = open_bundle(left).manifest
    assert (manifest.state, manifest.sm, manifest.engines) == ("needs-gpu-build", (89,), ())
    note = next(n for n in manifest.notes if n.startswith("no finished engine"))
    assert "no NVIDIA GPU" in note and "python build_engine.py" in note and "pip install" in note
    assert {"build_engine.py", "build_engine.json", "model.onnx"} <= {f.path for f in manifest.files}
    recipe = json.loads((left / "build_engine.json").read_text())
    assert [p["name"] for p in recipe["profiles"]] == ["decode", "prefill"]
    with pytest.raises(EnvironmentLacksError, match="this machine has none"):
        moe_export.load(left)


@without_gpu
def test_the_command_says_that_a_step_is_left(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_export.api.build", lambda *_args, **_options: open_bundle(left))
    result = CliRunner().invoke(cli, ["build", "x", "-o", "y", "--target", "tensorrt", "--sm", "89"])
    assert result.exit_code == 3
    assert "no finished engine" in result.output


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The bundle's own script, in an interpreter that cannot see moe-export."""
    command = [sys.executable, "-P", "build_engine.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_bundles_script_builds_and_completes_the_manifest(left: Path, tmp_path: Path) -> None:
    """What runs on the GPU machine, here with TensorRT-RTX in the place of TensorRT."""
    folder = tmp_path / "b"
    shutil.copytree(left, folder)
    path = folder / "build_engine.json"
    digest = {f.path for f in open_bundle(folder).manifest.files}
    recipe = json.loads(path.read_text())
    if gpu_sm() is None:
        refused = script(folder)
        assert refused.returncode == 3 and "error: " in refused.stderr and "Traceback" not in refused.stderr
        assert {f.path for f in open_bundle(folder).manifest.files} == digest
    recipe["library"] = "tensorrt_rtx"
    path.write_text(json.dumps(recipe))
    assert "can build: model.sm89.plan" in script(folder, "--check").stdout
    done = script(folder)
    assert done.returncode == 0, done.stderr
    shutil.copyfile(left / "build_engine.json", path)
    manifest = open_bundle(folder).manifest
    assert manifest.state == "ready"
    assert [(e.file, e.sm) for e in manifest.engines] == [("model.sm89.plan", 89)]
    assert "model.sm89.plan" in {f.path for f in manifest.files}
    assert any("built by build_engine.py" in note for note in manifest.notes)
    assert not any("no finished engine" in note for note in manifest.notes), "nothing is left to do"
    (engine,) = manifest.engines
    asked = tuple(profile["name"] for profile in recipe["profiles"])
    assert (engine.profiles == asked) == (not engine.fewer_profiles)
    assert any("profile prefill only" in note for note in manifest.notes) == bool(engine.fewer_profiles)


@without_gpu
def test_without_a_gpu_the_sm_must_be_named(model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no NVIDIA GPU here to build for; say which with --sm"):
        moe_export.build(model, tmp_path / "b", target="tensorrt-rtx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sm": (75,), "dtype": "float16", "expert_lowering": "plugin"},
            "no kernels for SM75; it has .*take native",
        ),
        ({"sm": (80,), "max_sequence": 10**7}, "beyond the .* positions the model was made for"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_export(
    model: torch.nn.Module, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_export.importer.export.export_model", None)
        with pytest.raises(UsageError, match=message):
            moe_export.build(model, tmp_path / "b", target="tensorrt-rtx", **options)
    assert not list(tmp_path.iterdir())


class OnTheCpu:
    """Runs the lowered graph in ONNX Runtime in the place of a plan: what is around a plan can be tested
    so."""

    def __init__(self, model: Path, manifest: Manifest) -> None:
        from moe_export.backends.onnxruntime.runner import create_session

        self._session = create_session(model, threads=1)
        self._outputs = [spec.name for spec in manifest.io.outputs]
        self._arrays: dict[int, Any] = {}
        self.capacities: list[int] = []

    def to_device(self, name: str, array: Any) -> DeviceArray:
        types = {v.name: v.type for v in self._session.get_inputs()}
        kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
        return self._hold(np.array(array, kinds[types[name]]))

    def to_host(self, array: DeviceArray) -> Any:
        return self._arrays[array.pointer]

    def run(self, inputs: Any) -> dict[str, DeviceArray]:
        feeds = {name: self._arrays[array.pointer] for name, array in inputs.items()}
        self.capacities += [len(a) for name, a in feeds.items() if name == "moe_capacity"]
        results = self._session.run(self._outputs, feeds)
        return {name: self._hold(a) for name, a in zip(self._outputs, results, strict=True)}

    def _hold(self, array: Any) -> DeviceArray:
        self._arrays[len(self._arrays)] = array
        return DeviceArray(len(self._arrays) - 1, array.shape, array.dtype)


def test_steps_on_a_gpu_feed_what_a_decoder_expects(model: torch.nn.Module, left: Path) -> None:
    manifest = open_bundle(left).manifest
    runner = OnTheCpu(left / "model.onnx", manifest)
    engine = GpuEngine(manifest, runner)
    ids = np.random.default_rng(0).integers(3, 127, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    reference = ReferenceModel(load_source(model)).run({"input_ids": ids, "attention_mask": mask})
    wanted = reference.outputs["logits"]
    stepper = GpuStepper(engine, manifest.io.inputs, manifest.limits, 2)
    parts = [stepper.feed(ids[:, a:b], mask[:, a:b])["logits"] for a, b in ((0, 5), (5, 6), (6, 9))]
    got = np.concatenate(parts, axis=1)
    assert np.abs(got - wanted)[mask == 1].max() < 1e-4
    broken = np.concatenate(parts[::-1], axis=1)
    assert np.abs(broken - wanted)[mask == 1].max() > 1e-2
    assert engine.capacity_use is not None and engine.capacity_use.runs == 3 and runner.capacities
    assert set(engine.outputs) == {s.name for s in manifest.io.outputs} - {"moe_max_load"}
    with pytest.raises(InputError, match="maximum"):
        stepper.feed(np.ones((2, 40), np.int64), np.ones((2, 40), np.int64))


def test_a_plan_shows_no_routing() -> None:
    ids = np.zeros((1, 2), np.int64)
    with pytest.raises(InputError, match="--simulate"):
        NoTraces().run({}, None)
    with pytest.raises(InputError, match="--simulate"):
        NoTraces().run_chunked(ids, ids, [1, 1], lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["native", "plugin"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_lowerings_for_three_sms(
    model: torch.nn.Module, tmp_path: Path, dtype: str, lowering: str
) -> None:
    bundle = moe_export.build(
        model, tmp_path / "b", target="tensorrt-rtx", sm=(80, 89, 120), dtype=dtype, expert_lowering=lowering,
        verify=False, **OPTIONS,
    )  # fmt: skip
    kinds = [engine.layer_kinds for engine in bundle.manifest.engines]
    assert len(kinds) == 3
    assert all(("custom_layer" in k) == (lowering == "plugin") for k in kinds)
    assert (bundle.path / "kernels").is_dir() == (lowering == "plugin")
    open_bundle(bundle.path)


@without_gpu
def test_tensorrts_own_layer_is_not_chosen_for_ranks(model: torch.nn.Module, tmp_path: Path) -> None:
    few = {**OPTIONS, "max_batch": 1, "max_sequence": 2, "verify": False, "dtype": "bfloat16", "sm": (100,)}
    built = [
        moe_export.build(model, tmp_path / f"{ranks}", target="tensorrt", ep=ranks, **few) for ranks in (1, 2)
    ]
    (alone, *_), (divided, *_) = (
        [d for d in bundle.manifest.decisions if d.subject.endswith(": experts")] for bundle in built
    )
    assert "TRT_MoE" in alone.choice, "the layer is not chosen at all"
    assert "TRT_MoE" not in divided.choice
    assert any("may drop assignments" in other.reason for other in divided.alternatives)
