"""Session creation: the provider asked for, threads, errors of one line, nothing on the terminal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from moe_export.backends.onnxruntime import runner
from moe_export.backends.onnxruntime.runner import create_session, default_threads
from moe_export.errors import BundleError, EnvironmentLacksError
from moe_export.runtime.engine import Engine
from tests.helpers.tiny_bundle import TinyWeights, build_tiny_model


def test_the_cpu_provider_and_no_other(tiny_path: Path) -> None:
    session = create_session(tiny_path / "model.onnx", threads=1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 1


def test_a_missing_provider_is_the_environments_fault(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PROVIDERS", ["AbsentExecutionProvider"])
    with pytest.raises(EnvironmentLacksError, match="lacks AbsentExecutionProvider"):
        create_session(tiny_path / "model.onnx")


def test_default_threads_respect_affinity() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(before)})
            assert default_threads() == 1
        finally:
            os.sched_setaffinity(0, before)


@pytest.mark.parametrize("prepack", [True, False])
def test_a_model_in_memory_finds_its_weights(tiny_path: Path, prepack: bool) -> None:
    model = (tiny_path / "model.onnx").read_bytes()
    assert create_session(model, folder=tiny_path, prepack=prepack).get_inputs()
    with pytest.raises(BundleError, match="the model: ONNX Runtime cannot load it"):
        create_session(model)


@pytest.mark.parametrize("damage", [b"", b"not a model", "cut"], ids=["empty", "text", "cut"])
def test_damaged_models_give_one_line_and_no_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: bytes | str
) -> None:
    whole: bytes = build_tiny_model(TinyWeights.make()).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[: len(whole) // 2] if isinstance(damage, str) else damage)
    with pytest.raises(BundleError) as caught:
        create_session(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_model_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent\.onnx"):
        create_session(tmp_path / "absent.onnx")


def test_a_failing_run_is_an_error_of_ours_without_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.array([2, 2]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    engine = Engine(create_session(model.SerializeToString()), "some.onnx", ["y"])
    assert engine.run({"x": np.zeros(4, np.float32)})["y"].shape == (2, 2)
    with pytest.raises(BundleError, match=r"some\.onnx: the run failed: .*Reshape") as caught:
        engine.run({"x": np.zeros(5, np.float32)})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
