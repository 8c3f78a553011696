"""Repositories for Triton's TensorRT backend: plans by GPU type, and one plan per rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moe_export.errors import BundleError, EnvironmentLacksError, UsageError
from moe_export.package import package_bundle
from moe_export.schema import ExpertParallel

from .samples import (
    IO,
    PLAIN_IO,
    engine,
    expected,
    load_model,
    names,
    onnx_bundle,
    ranks_bundle,
    read_config,
    tensorrt_bundle,
)

TENSORS = """
max_batch_size: 0
input { name: "input_ids" data_type: TYPE_INT64 dims: [ -1, -1 ] }
input { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1, -1 ] }
input { name: "past.0.key" data_type: TYPE_BF16 dims: [ -1, 2, -1, 16 ] }
input { name: "past.0.conv" data_type: TYPE_FP16 dims: [ -1, 24, 4 ] }
input { name: "moe_capacity" data_type: TYPE_INT32 dims: [ -1 ] }
output { name: "logits" data_type: TYPE_FP32 dims: [ -1, -1, 100 ] }
output { name: "present.0.key" data_type: TYPE_BF16 dims: [ -1, 2, -1, 16 ] }
output { name: "present.0.conv" data_type: TYPE_FP16 dims: [ -1, 24, 4 ] }
output { name: "moe_max_load" data_type: TYPE_INT32 dims: [ 3 ] }
"""
PLAIN_TENSORS = "\n".join(line for line in TENSORS.splitlines() if "moe_" not in line)
PLANS = """
name: "net" platform: "tensorrt_plan" backend: "tensorrt"
cc_model_filenames { key: "8.9" value: "model.sm89.plan" }
cc_model_filenames { key: "10.0" value: "model.sm100.plan" }
instance_group { count: 1 kind: KIND_GPU profile: "0" profile: "1" }
"""
# The parameters of the TensorRT backend's docs/multi_device.md.
RANKS = """
name: "net" platform: "tensorrt_plan" backend: "tensorrt" default_model_filename: "model.plan"
instance_group [ { kind: KIND_MODEL count: 1 } ]
parameters [
  { key: "enable_multi_device" value: { string_value: "true" } },
  { key: "multi_device_gpus" value: { string_value: "0,1,2,3" } },
  { key: "multi_device_per_rank_engines" value: { string_value: "true" } }
]
"""


def test_a_plan_for_each_type_of_gpu(tmp_path: Path) -> None:
    both = ("decode", "prefill")
    engines = engine("model.sm89.plan", 89, both), engine("model.sm100.plan", 100, both)
    made = package_bundle(tensorrt_bundle(tmp_path / "net", *engines), tmp_path / "repository")
    config = read_config(made.path, "net")
    assert config == expected(PLANS + TENSORS)
    assert config != expected(PLANS.replace('profile: "1"', "") + TENSORS)
    inside = names(made.path / "net/1")
    assert inside == ["model.sm100.plan", "model.sm89.plan", "moe-export/manifest.json",
                      "moe-export/tokenizer/tokenizer.json"]  # fmt: skip
    assert (made.path / "net/1/model.sm100.plan").read_text() == "plan model.sm100.plan"
    assert any("11.4.0.106" in note for note in made.notes)


def test_one_profile_needs_no_name_and_gpus_can_be_chosen(tmp_path: Path) -> None:
    bundle = tensorrt_bundle(tmp_path / "net", engine("model.sm89.plan"))
    made = package_bundle(bundle, tmp_path / "repository", gpus=(1, 3))
    (group,) = read_config(made.path, "net").instance_group
    assert (list(group.profile), list(group.gpus)) == ([], [1, 3])


def test_a_plan_for_each_rank(tmp_path: Path) -> None:
    made = package_bundle(ranks_bundle(tmp_path / "net"), tmp_path / "repository")
    config = read_config(made.path, "net")
    assert config == expected(RANKS + PLAIN_TENSORS)
    assert config != expected(RANKS.replace("0,1,2,3", "0,1,2") + PLAIN_TENSORS)
    folder = made.path / "net/1"
    for rank in range(4):
        assert (folder / f"model.plan.rank{rank}").read_text() == f"plan rank{rank}/model.sm89.plan"
    assert os.readlink(folder / "model.plan") == "model.plan.rank0"
    assert (folder / "model.plan").read_text() == "plan rank0/model.sm89.plan"
    readme = (made.path / "README.md").read_text()
    assert "4 GPUs of SM89" in readme and "TRITON_ENABLE_TENSORRT_MULTI_DEVICE=ON" in readme
    assert "not run on a GPU" in readme


def test_ranks_on_other_gpus_and_of_one_of_several_sms(tmp_path: Path) -> None:
    bundle = ranks_bundle(tmp_path / "net", ranks=2, sms=(80, 90))
    with pytest.raises(UsageError, match="--sm"):
        package_bundle(bundle, tmp_path / "repository")
    with pytest.raises(UsageError, match="choices: 80, 90"):
        package_bundle(bundle, tmp_path / "repository", sm=89)
    made = package_bundle(bundle, tmp_path / "repository", sm=90, gpus=(5, 2))
    assert read_config(made.path, "net").parameters["multi_device_gpus"].string_value == "5,2"
    assert (made.path / "net/1/model.plan.rank1").read_text() == "plan rank1/model.sm90.plan"


@pytest.mark.parametrize(
    ("changes", "options", "kind", "said"),
    [
        ({}, {"gpus": (0, 1)}, UsageError, "4 ranks"),
        ({"expert_parallel": ExpertParallel(4, "alltoall")}, {}, UsageError, "--ep-mode allreduce"),
        ({"expert_parallel": ExpertParallel(5, "allreduce")}, {}, BundleError, "rank 4"),
        ({"state": "needs-gpu-build"}, {}, EnvironmentLacksError, "build_engine.py"),
        ({"target": "tensorrt-rtx"}, {}, UsageError, "--target tensorrt"),
        ({"target": "portable"}, {}, UsageError, "--target onnxruntime"),
        ({"target": "onnxruntime"}, {}, UsageError, "mpiexec -n 4"),
    ],
)
def test_bundles_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    bundle = ranks_bundle(tmp_path / "net", **changes)
    with pytest.raises(kind, match=said):
        package_bundle(bundle, tmp_path / "repository", **options)
    assert not (tmp_path / "repository").exists()


def test_rank_0_must_speak_of_the_buckets_of_all_ranks(tmp_path: Path) -> None:
    common = load_model("Cast", "DistCollective", "Cast")
    made = package_bundle(ranks_bundle(tmp_path / "net", io=IO, model=common), tmp_path / "repository")
    assert read_config(made.path, "net") == expected(RANKS + TENSORS)
    own = load_model("DistCollective", "Neg")
    with pytest.raises(BundleError, match="one rank's buckets"):
        package_bundle(ranks_bundle(tmp_path / "own", io=IO, model=own), tmp_path / "other")


def test_ranks_with_two_profiles_are_refused(tmp_path: Path) -> None:
    engines = [engine(f"rank{r}/model.plan", 89, ("decode", "prefill")) for r in range(2)]
    parallel = ExpertParallel(2, "allreduce")
    bundle = tensorrt_bundle(tmp_path / "net", *engines, expert_parallel=parallel, io=PLAIN_IO)
    with pytest.raises(UsageError, match="one profile"):
        package_bundle(bundle, tmp_path / "repository")


def test_plans_with_different_profiles_are_refused(tmp_path: Path) -> None:
    engines = engine("a.plan", 89, ("decode", "prefill")), engine("b.plan", 90, ("all",))
    with pytest.raises(UsageError, match="SM90 has all"):
        package_bundle(tensorrt_bundle(tmp_path / "net", *engines), tmp_path / "repository")


def test_sm_is_for_ranks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave sm out"):
        package_bundle(tensorrt_bundle(tmp_path / "net", engine("a.plan")), tmp_path / "repository", sm=89)


def test_a_bundle_without_plans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no plans"):
        package_bundle(tensorrt_bundle(tmp_path / "net"), tmp_path / "repository")


def test_the_readme_says_what_a_client_sends(tmp_path: Path) -> None:
    made = package_bundle(tensorrt_bundle(tmp_path / "net", engine("a.plan")), tmp_path / "repository")
    readme = (made.path / "README.md").read_text()
    for words in (
        "[batch, 2, 0, 16]",
        "`past.0.conv`: zeros",
        "largest value of `moe_max_load` is not more",
        "at most 4 sequences and at most 2048 tokens",
        "64 B per token of the past and 192 B, per sequence",
        "was not run where this was written",
        "--gpus all",
    ):
        assert words in readme, words
    plain = package_bundle(onnx_bundle(tmp_path / "plain"), tmp_path / "other").path / "README.md"
    assert "prefill" not in plain.read_text() and "--gpus" not in plain.read_text()
