"""``moe-export package``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from moe_export.cli.main import cli
from tests.package.samples import onnx_bundle, ranks_bundle, read_config


def invoke(*args: object, **options: Any) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], **options)


def test_says_what_was_written_and_how_to_serve_it(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "net")
    result = invoke("package", bundle, "--format", "triton", "-o", tmp_path / "repository")
    assert result.exit_code == 0, result.output
    assert f"packaged {tmp_path / 'repository'}: model net, backend onnxruntime" in result.stdout
    assert str(tmp_path / "repository/README.md") in result.stdout


def test_every_option_reaches_the_package(tmp_path: Path) -> None:
    bundle = ranks_bundle(tmp_path / "net", ranks=2, sms=(80, 90))
    (tmp_path / "repository").mkdir()
    options = ["--format", "triton", "--name", "mine", "--server-path", "/srv", "--gpus", "3,0", "--sm", 90]
    flags = ["--overwrite", "--trust", "--json"]
    result = invoke("package", bundle, "-o", tmp_path / "repository", *options, *flags)
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert (made["format"], made["model"], made["backend"]) == ("triton", "mine", "tensorrt")
    assert any("SM90" in note for note in made["notes"])
    config = read_config(tmp_path / "repository", "mine")
    assert config.parameters["multi_device_gpus"].string_value == "3,0"
    assert "/srv" in (tmp_path / "repository/README.md").read_text()


def test_an_unknown_format_lists_those_there_are(tmp_path: Path) -> None:
    result = invoke("package", onnx_bundle(tmp_path / "net"), "--format", "tritn", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "format: unknown value 'tritn'; nearest: triton; choices: triton" in result.stderr
