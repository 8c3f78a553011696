"""What ``list targets`` and ``doctor`` say of GPU targets on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import moe_export
from moe_export.backends.trt import machine
from moe_export.backends.trt.build_engine import gpu_sm
from moe_export.backends.trt.machine import GpuFound
from moe_export.cli.main import cli
from moe_export.errors import EnvironmentLacksError
from moe_export.models.families import tiny_model


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_the_matrix() -> None:
    found = {row["name"]: row for row in json.loads(invoke("list", "targets", "--json").stdout)}
    rtx = {row["sm"]: row for row in found["tensorrt-rtx"]["sms"]}
    assert set(rtx) == {75, 80, 86, 89, 120, 121} and all(row["builds"] for row in rtx.values())
    assert rtx[75]["dtypes"] == ["float16"] and rtx[75]["lowerings"] == ["native"]
    assert rtx[89]["dtypes"] == ["float32", "float16", "bfloat16"]
    assert rtx[89]["lowerings"] == ["native", "plugin"]
    assert {90, 100} <= {row["sm"] for row in found["tensorrt"]["sms"]}
    assert found["onnxruntime"]["sms"] == []
    text = invoke("list", "targets").stdout
    for word in ("SM120", "expert lowerings", "builds here", "plugin"):
        assert word in text


@pytest.mark.skipif(gpu_sm() is not None, reason="a machine without a GPU is what it is about")
def test_what_is_missing_and_how_to_get_it() -> None:
    text = invoke("list", "targets").stdout
    assert "pip install 'moe-export[tensorrt]'" in text
    assert "running: an NVIDIA GPU of one of the target's SMs with driver 580 or later" in text
    assert invoke("doctor").exit_code == 0, "targets of the CPU decide"
    asked = invoke("doctor", "--target", "tensorrt-rtx")
    assert asked.exit_code == 3 and "builds engines only" in asked.stdout and "an NVIDIA GPU" in asked.output


def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_gpu", lambda: GpuFound(89, (13, 1)))
    assert machine.run_lacks("tensorrt-rtx", 89) == ()
    assert machine.run_lacks("tensorrt-rtx", 80) == ("running: a GPU of SM80 (here: SM89)",)
    assert [row.sm for row in machine.target_matrix("tensorrt-rtx") if row.runs] == [89]
    monkeypatch.setattr(machine, "find_gpu", lambda: GpuFound(89, (12, 8)))
    (lack,) = machine.run_lacks("tensorrt-rtx", 89)
    assert lack == "running: driver 580 or later (here: one for CUDA 12.8)"


def test_a_missing_library_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_export.backends.trt.library.library_version", lambda _target: None)
    monkeypatch.setattr("moe_export.importer.sources.load_source", None)
    with pytest.raises(EnvironmentLacksError, match=r"pip install 'moe-export\[tensorrt-rtx\]'"):
        moe_export.build(tiny_model("mixtral"), tmp_path / "b", target="tensorrt-rtx", sm=(89,))
    assert not list(tmp_path.iterdir())


def test_a_version_that_is_refused_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although without TensorRT everything up to the plan would be made."""
    for module in ("library", "backend"):
        monkeypatch.setattr(f"moe_export.backends.trt.{module}.library_version", lambda _target: "10.14.1.48")
    monkeypatch.setattr("moe_export.importer.sources.load_source", None)
    with pytest.raises(EnvironmentLacksError, match="tensorrt: TensorRT 10.14.1.48 is refused: .* 10.15"):
        moe_export.build(tiny_model("mixtral"), tmp_path / "b", target="tensorrt", sm=(89,))
    assert not list(tmp_path.iterdir())
