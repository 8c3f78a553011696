"""``moe-export verify`` and ``bench`` on hand-written bundles; the yardstick is a golden file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from moe_export.cli.main import cli
from moe_export.verify import verify_bundle
from tests.helpers.tiny_bundle import make_tiny_bundle
from tests.helpers.tiny_model import TinyReference, TinyWeights


def invoke(*args: object, **options: Any) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], **options)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("verify") / "bundle")


@pytest.fixture(scope="module")
def golden(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "golden.npz"
    assert verify_bundle(bundle, against=TinyReference(TinyWeights.make()), save_golden=path).passed
    return path


def test_a_right_engine(bundle: Path, golden: Path, tmp_path: Path) -> None:
    files = ("--output", tmp_path / "out", "--junit", tmp_path / "j" / "p.xml")
    result = invoke("verify", bundle, "--against", golden, *files)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("verified against golden")
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["parity.json", "parity.junit.xml", "parity.md"]
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"] is True
    assert ElementTree.parse(tmp_path / "j" / "p.xml").getroot().get("failures") == "0"


@pytest.mark.parametrize("defect", ["expert_swapped", "cache_shifted"])
def test_a_broken_engine_exits_1_and_names_the_divergence(defect: str, golden: Path, tmp_path: Path) -> None:
    broken = make_tiny_bundle(tmp_path / "bundle", broken=defect)
    result = invoke("verify", broken, "--against", golden, "--junit", tmp_path / "p.xml")
    assert result.exit_code == 1
    assert "first divergence: " in result.stdout
    assert "FAILED" in result.stdout
    assert "NOT VERIFIED" in result.stdout.splitlines()[-1]
    assert int(ElementTree.parse(tmp_path / "p.xml").getroot().get("failures", "0")) > 0
    report = json.loads(invoke("verify", broken, "--against", golden, "--json", "-q").stdout)
    assert report["passed"] is False
    assert report["findings"][0]["message"] in result.stdout


def test_a_tighter_tolerance_fails(bundle: Path, golden: Path) -> None:
    assert invoke("verify", bundle, "--against", golden, "--tolerance", "logits=1e-12", "-q").exit_code == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--against"),
        (["--against", "no-such-folder"], "no-such-folder"),
        (["--tolerance", "logitz=1"], "logits"),
        (["--save-golden", "golden.txt"], ".npz"),
        (["--text", "no-such-file"], "no-such-file: No such file"),
    ],
)
def test_wrong_use_of_verify(bundle: Path, args: list[str], message: str) -> None:
    result = invoke("verify", bundle, *args, "-q")
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_report_that_cannot_be_written(bundle: Path, golden: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--junit", "--output"):
        result = invoke("verify", bundle, "--against", golden, option, tmp_path / "file" / "x", "-q")
        assert result.exit_code == 2
        assert "cannot be written" in result.stderr


def test_bench_without_baselines(bundle: Path) -> None:
    args = ("bench", bundle, "--baselines", "none", "--batch", "1,2", "--sequence", "8", "--decode-tokens", 4)
    result = invoke(*args, "--rounds", 2, "--routing", "real", "--threads", 1, "--json", "-q")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    cells = {(row["phase"], row["batch"], row["sequence"]) for row in report["rows"]}
    assert cells == {(phase, batch, 8) for phase in ("prefill", "decode") for batch in (1, 2)}


def test_speedup_gate_without_anything_to_compare_fails(bundle: Path) -> None:
    args = ("bench", bundle, "--baselines", "none", "--sequence", "8", "--decode-tokens", 2, "--rounds", 1)
    result = invoke(*args, "--routing", "real", "--threads", 1, "--min-speedup", "1.0", "-q")
    assert result.exit_code == 1
    assert "no speed-up" in result.stderr
    assert "prefill" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "0"], "whole numbers of at least 1"),
        (["--baselines", "tpu"], "unknown 'tpu'"),
        (["--routing", "random"], "unknown 'random'"),
        (["--min-speedup", "0"], "a number above 0"),
        (["--sequence", "4096"], "maximum sequence of 64"),
    ],
)
def test_wrong_use_of_bench(bundle: Path, args: list[str], message: str) -> None:
    result = invoke("bench", bundle, *args, "-q")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
