"""Ranks for TensorRT: plans by the real TensorRT-RTX, every exchange a layer of them, all ranks simulated in
one process against one rank, and what finishes, loads and packages them. No GPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import moe_export
from moe_export.backends.onnxruntime.runner import create_session
from moe_export.backends.trt import build_engine
from moe_export.backends.trt.child import run_builder
from moe_export.backends.trt.profiles import make_profiles
from moe_export.bundle import open_bundle
from moe_export.bundle.reader import Bundle
from moe_export.errors import BuildError, UsageError
from moe_export.importer.export import ExportedModel, export_model
from moe_export.models.families import tiny_model
from moe_export.package import package_bundle
from moe_export.passes.dist_collectives import OP
from moe_export.schema import ExpertParallel, Limits, ModelIO, TensorSpec
from moe_export.verify.merged_session import merged_bundle
from moe_export.verify.simulate import load_simulated
from tests.backends.trt.small import recipe
from tests.expert_parallel.mpi import COMMAND, mpiexec, needs_mpi
from tests.helpers.one_export import one_export

torch.set_num_threads(1)
pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.timeout(900)
without_gpu = pytest.mark.skipif(
    build_engine.gpu_sm() is not None, reason="a machine without a GPU is what it is about"
)
OPTIONS: dict[str, Any] = {"bench": False, "threads": 1, "max_sequence": 32, "ep": 2}


def write_exchange(folder: Path, operation: str, reduce: str, ranks: int = 2) -> None:
    """``y = exchange(x @ w)`` with ``x`` [rows, 16]."""
    weight = np.linspace(-1, 1, 16 * 8).reshape(16, 8).astype(np.float32)
    exchange = helper.make_node(
        OP, ["p"], ["e"], "moe.exchange.0",
        collective_operation=operation, reduce_op=reduce, root=-1, nb_rank=ranks,
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), exchange, helper.make_node("Relu", ["e"], ["y"])],
        "exchange",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")


@pytest.mark.parametrize(
    ("operation", "reduce"), [("all_reduce", "sum"), ("all_reduce", "max"), ("all_to_all", "none")]
)
def test_an_exchange_is_a_layer_on_every_sm_and_profile(tmp_path: Path, operation: str, reduce: str) -> None:
    write_exchange(tmp_path, operation, reduce)
    few = {"name": "few", "shapes": {"x": [[2, 16], [2, 16], [2, 16]]}}
    wanted = recipe([80, 89, 120], collectives=["moe.exchange.0"])
    wanted["profiles"] = [few, {"name": "all", "shapes": {"x": [[2, 16], [4, 16], [64, 16]]}}]
    engines = run_builder(wanted, tmp_path)
    assert [e.sm for e in engines] == [80, 89, 120]
    for engine in engines:
        found = sum(n for kind, n in engine.layer_kinds.items() if kind.startswith("comm_"))
        assert found == len(engine.profiles)


def test_a_plan_without_an_exchange_of_its_recipe_is_refused(tmp_path: Path) -> None:
    write_exchange(tmp_path, "all_reduce", "sum")
    wanted = recipe([89], collectives=["moe.exchange.0", "moe.exchange.1"])
    with pytest.raises(BuildError, match=r"'moe.exchange.1' is 0 layers of the plan, not 1: .* wrong"):
        run_builder(wanted, tmp_path)
    assert not list(tmp_path.glob("*.plan"))
    layer = {"name": "l", "kind": "comm_allreduce", "onnx": ["moe.exchange.0"]}
    given = recipe([89], collectives=["moe.exchange.0"])
    build_engine._check_collectives(given, [layer, layer], 2, "p")
    for lost in ([layer], [layer, {**layer, "kind": "copy"}], [layer, {**layer, "onnx": ["other"]}]):
        with pytest.raises(build_engine.CannotBuild, match="is 1 layers of the plan, not 2"):
            build_engine._check_collectives(given, lost, 2, "p")


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
def summed(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two ranks that sum, verified by simulation."""
    folder = tmp_path_factory.mktemp("summed") / "b"
    return moe_export.build(model, folder, target="tensorrt-rtx", sm=(89,), max_batch=2, **OPTIONS)


@pytest.fixture(scope="module")
def sent(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three ranks that send tokens, for one sequence: two ranks repeat it. 4 experts lie on 3 ranks."""
    folder = tmp_path_factory.mktemp("sent") / "b"
    options = {**OPTIONS, "ep": 3, "ep_mode": "alltoall", "max_batch": 1}
    return moe_export.build(model, folder, target="tensorrt-rtx", sm=(89,), **options)


@pytest.fixture(scope="module")
def left(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """For standard TensorRT, without the GPU."""
    folder = tmp_path_factory.mktemp("left") / "b"
    return moe_export.build(
        model, folder, target="tensorrt", sm=(80, 89), max_batch=2, verify=False, **OPTIONS
    )


def check_plans(bundle: Bundle, ranks: int, sms: Sequence[int]) -> None:
    """A plan per rank and SM with every exchange of the rank's graph in each profile."""
    manifest = open_bundle(bundle.path).manifest
    assert manifest.state == "ready"
    files = [f"rank{r}/model.sm{sm}.plan" for r in range(ranks) for sm in sms]
    assert sorted(e.file for e in manifest.engines) == sorted(files)
    assert {f.path for f in manifest.files} >= {*files, *(f"rank{r}/model.onnx" for r in range(ranks))}
    for engine in manifest.engines:
        assert engine.file.startswith(f"rank{engine.rank}/")
        graph = onnx.load(bundle.path / f"rank{engine.rank}/model.onnx", load_external_data=False).graph
        names = {node.name for node in graph.node if node.op_type == OP}
        listed = bundle.path / "evidence" / f"rank{engine.rank}.model.sm{engine.sm}.plan.layers.json"
        layers = json.loads(listed.read_text())
        kept = [name for layer in layers if layer["kind"].startswith("comm_") for name in layer["onnx"]]
        held = [name for name in kept if name in names]
        assert names and sorted(held) == sorted([*names] * len(engine.profiles))


def check_parity(bundle: Bundle) -> None:
    """All ranks, run as one on the CPU, do what the source model does."""
    parity = bundle.manifest.evidence["parity"]
    assert parity["passed"] and parity["simulated"]


def test_ranks_that_sum(summed: Bundle) -> None:
    check_plans(summed, 2, (89,))
    check_parity(summed)


def test_ranks_that_send_tokens_of_one_sequence(sent: Bundle, model: torch.nn.Module) -> None:
    check_plans(sent, 3, (89,))
    check_parity(sent)
    parallel = sent.manifest.expert_parallel
    assert parallel is not None and sorted(len(e) for e in parallel.layers[0].experts) == [1, 1, 2]
    ids = np.full((1, 32), 7)
    with load_simulated(sent.path, threads=1) as session:
        found = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
        use = session.capacity_use
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(found - wanted).max() < 1e-4
    assert use is not None and use.largest_load > 32, "more than one rank's tokens on one expert"


def test_all_ranks_see_one_load(summed: Bundle) -> None:
    """So all run again with larger buckets, or none does; alone they would differ."""
    with merged_bundle(summed) as merged:
        file = merged.path / "shown.onnx"
        shown = onnx.load(merged.model_path, load_external_data=False)
        (most,) = [n for n in shown.graph.node if n.op_type == "Max" and n.output[0].startswith("exchange")]
        own = list(most.input)
        agreed = [f"rank{rank}.moe_max_load" for rank in range(2)]
        for name, kind in (*((n, TensorProto.FLOAT) for n in own), *((n, TensorProto.INT32) for n in agreed)):
            shown.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        onnx.save(shown, file)
        session = create_session(file, threads=1)
        feeds: dict[str, Any] = {}
        for spec in merged.manifest.io.inputs:
            shape = [{"batch": 1, "past": 0}.get(str(d), d if isinstance(d, int) else 32) for d in spec.shape]
            feeds[spec.name] = np.zeros(shape, spec.dtype)
        ids = np.random.default_rng(3).integers(3, 127, (1, 32))
        feeds |= {"input_ids": ids, "moe_capacity": np.zeros(4, np.int32)}
        feeds["attention_mask"] = np.ones((1, 32), np.int64)
        results = session.run([*own, *agreed], feeds)
    alone, together = results[:2], results[2:]
    assert (together[0] == together[1]).all() and together[0].max() > 4
    assert (together[0] == np.maximum(*alone)).all() and (alone[0] != alone[1]).any()


@needs_mpi
@without_gpu
def test_loading_without_gpus_ends_all_ranks_with_one_error(summed: Bundle) -> None:
    done = mpiexec(2, COMMAND, "run", summed.path, "--prompt-ids", "1,2")
    assert done.code == 3 and len(done.errors) == 1, done.err
    assert "is for NVIDIA GPUs of SM89, and this machine has none" in done.errors[0]
    words = [COMMAND, "run", summed.path, "--prompt-ids", "1,2"]
    alone = subprocess.run(words, capture_output=True, text=True, check=False)
    assert alone.returncode != 0 and "mpiexec -n 2" in alone.stderr


def test_the_plan_of_the_rank_is_taken(summed: Bundle) -> None:
    for rank in range(2):
        (engine,) = dataclasses.replace(summed, rank=rank).rank_manifest.engines
        assert (engine.file, engine.rank) == (f"rank{rank}/model.sm89.plan", rank)


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The bundle's own script, in an interpreter that cannot see moe-export."""
    command = [sys.executable, "-P", "build_engine.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def copy_for_rtx(left: Bundle, folder: Path) -> Path:
    """What is copied to a machine with the GPU; TensorRT-RTX is in the place of TensorRT."""
    shutil.copytree(left.path, folder)
    for rank in range(2):
        path = folder / f"rank{rank}/build_engine.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "library": "tensorrt_rtx"}))
    return folder


def restore(left: Bundle, folder: Path) -> Bundle:
    """With the recipes that the manifest's hashes are of."""
    for rank in range(2):
        name = f"rank{rank}/build_engine.json"
        shutil.copyfile(left.path / name, folder / name)
    return open_bundle(folder)


@without_gpu
def test_what_is_left_to_do_on_the_gpu_machine(left: Bundle) -> None:
    manifest = open_bundle(left.path).manifest
    assert (manifest.state, manifest.sm, manifest.engines) == ("needs-gpu-build", (80, 89), ())
    listed = {f.path for f in manifest.files}
    recipes = {f"rank{r}/{name}" for r in range(2) for name in ("build_engine.py", "build_engine.json")}
    assert {"build_engine.py", *recipes} <= listed
    found = json.loads((left.path / "rank1/build_engine.json").read_text())
    assert found["collectives"] and found["rank"] == 1
    assert [p["name"] for p in found["profiles"]] == ["all"], "Triton runs ranks with one profile only"
    refused = script(left.path)
    assert refused.returncode == 3 and "error: " in refused.stderr and "Traceback" not in refused.stderr
    assert script(left.path, "--rank", "2").returncode == 2
    alone = script(left.path / "rank0")
    assert alone.returncode == 2 and "run build_engine.py in the bundle's folder" in alone.stderr


def test_one_command_finishes_all_ranks_and_triton_takes_them(left: Bundle, tmp_path: Path) -> None:
    folder = copy_for_rtx(left, tmp_path / "b")
    assert "can build: model.sm80.plan, model.sm89.plan" in script(folder, "--check").stdout
    done = script(folder)
    assert done.returncode == 0, done.stderr
    bundle = restore(left, folder)
    check_plans(bundle, 2, (80, 89))
    notes = [n for n in bundle.manifest.notes if "built by build_engine.py" in n]
    assert len(notes) == 1 and "rank1/model.sm89.plan" in notes[0]
    assert not any("no finished engine" in note for note in bundle.manifest.notes)
    made = package_bundle(folder, tmp_path / "repository", sm=89)
    for rank in range(2):
        packed = made.path / f"b/1/model.plan.rank{rank}"
        assert packed.read_bytes() == (folder / f"rank{rank}/model.sm89.plan").read_bytes()


def test_ranks_built_on_two_machines(left: Bundle, tmp_path: Path) -> None:
    one, other = (copy_for_rtx(left, tmp_path / name) for name in ("one", "other"))
    for folder, rank in ((one, 0), (other, 1)):
        path = folder / f"rank{rank}/build_engine.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "sms": [89], "plans": {"89": "model.sm89.plan"}}))
    nothing = script(one, "--collect")
    assert nothing.returncode == 1 and "no plan lies here" in nothing.stderr
    for folder, rank in ((one, "0"), (other, "1")):
        done = script(folder, "--rank", rank)
        assert done.returncode == 0 and "some are still missing" in done.stdout, done.stderr
    assert json.loads((one / "manifest.json").read_text())["state"] == "needs-gpu-build"
    for name in ("rank1/model.sm89.plan", "evidence/rank1.model.sm89.plan.json", "rank1/build_engine.json"):
        shutil.copyfile(other / name, one / name)
    done = script(one, "--collect")
    assert done.returncode == 0 and "missing" not in done.stdout, done.stderr
    assert restore(left, one).manifest.state == "ready"
    (one / "rank1/model.sm89.plan").write_bytes(b"another")
    wrong = script(one, "--collect")
    assert wrong.returncode == 1 and "rank1/model.sm89.plan is not the plan of" in wrong.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sm": (75,)}, "TensorRT exchanges between GPUs from SM80 on; leave out SM75"),
        ({"ep_mode": "alltoall", "ep_overflow": "error", "ep_capacity_factor": 1.5}, "target onnxruntime"),
        ({"target": "tensorrt", "sm": (100,), "native_lowering": "trt_moe"}, "trt_moe is for one rank"),
    ],
)
def test_what_ranks_cannot_be_is_refused_before_the_export(
    model: torch.nn.Module, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match=message):
        patch.setattr("moe_export.importer.export.export_model", None)
        given = {"target": "tensorrt-rtx", "sm": (89,), "dtype": "bfloat16", **OPTIONS, **options}
        if 75 in given["sm"]:
            given["dtype"] = "float16"
        moe_export.build(model, tmp_path / "b", **given)
    assert not list(tmp_path.iterdir())


def test_a_rank_has_room_for_what_all_send() -> None:
    io = ModelIO(
        (TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
         TensorSpec("moe_capacity", "int32", ("capacity",), "capacity")), (),
    )  # fmt: skip
    for mode, most, room in (("allreduce", (5, 8), 40), ("alltoall", (2, 8), 64)):
        plan = ExpertParallel(4, "alltoall" if mode == "alltoall" else "allreduce")
        (profile,) = make_profiles(io, Limits(5, 8), split=True, parallel=plan)
        assert profile.shapes["input_ids"][2] == most
        assert profile.shapes["moe_capacity"][2] == (room,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("allreduce", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (("alltoall", "bfloat16"), ("allreduce", "bfloat16"), ("alltoall", "float32"))
        ),
    ],
)
def test_three_sms(model: torch.nn.Module, tmp_path: Path, mode: str, dtype: str) -> None:
    options = {**OPTIONS, "ep": 3, "ep_mode": mode, "dtype": dtype, "max_batch": 4}
    made = moe_export.build(model, tmp_path / "b", target="tensorrt-rtx", sm=(80, 89, 120), **options)
    check_plans(made, 3, (80, 89, 120))
    check_parity(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["allreduce", pytest.param("alltoall", marks=pytest.mark.nightly)]
)
def test_replicas_of_hot_experts(model: torch.nn.Module, tmp_path: Path, mode: str) -> None:
    trace = tmp_path / "trace.json"
    layers = [{"counts": [50, 30, 12, 8], "dropped": 0}, {"counts": [5, 5, 30, 60], "dropped": 0}]
    trace.write_text(json.dumps({"tokens": 50, "layers": layers}))
    placed = {"placement": "balanced", "trace": str(trace), "redundant_experts": 2}
    options = {**OPTIONS, **placed, "ep_mode": mode, "max_batch": 2}
    made = moe_export.build(model, tmp_path / "b", target="tensorrt-rtx", sm=(89,), **options)
    parallel = made.manifest.expert_parallel
    assert parallel is not None
    held = [expert for rank in parallel.layers[0].experts for expert in rank]
    assert len(held) > len(set(held)) == 4, "an expert lies on both ranks"
    check_plans(made, 2, (89,))
    check_parity(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gpt_oss", "qwen3_moe"))],
)
def test_families(tmp_path: Path, family: str) -> None:
    options = {**OPTIONS, "ep_mode": "alltoall", "max_batch": 2}
    made = moe_export.build(tiny_model(family), tmp_path / "b", target="tensorrt-rtx", sm=(89,), **options)
    check_plans(made, 2, (89,))
    check_parity(made)


@pytest.mark.slow
def test_plugin_nodes_on_ranks(model: torch.nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    options = {**OPTIONS, "expert_lowering": "plugin", "max_batch": 2}
    made = moe_export.build(model, tmp_path / "b", target="tensorrt-rtx", sm=(89,), **options)
    check_plans(made, 2, (89,))
    assert all(e.layer_kinds["custom_layer"] == 2 for e in made.manifest.engines)
    assert all((made.path / f"rank{rank}/kernels").is_dir() for rank in range(2))
    check_parity(made)
