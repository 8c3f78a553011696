"""``moe-export build`` and ``export``: flags become a configuration; a real build; an interrupted one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from moe_export.bundle import Bundle
from moe_export.bundle.manifest import read_manifest
from moe_export.cli.main import cli
from moe_export.config import BuildConfig
from moe_export.errors import CheckFailed
from tests.helpers.tiny_bundle import make_tiny_bundle, write_tiny_tokenizer


def invoke(*args: object, **options: Any) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], **options)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Replaces the library's build: records what it is asked and answers with a hand-written bundle."""
    asked: dict[str, Any] = {}
    folder = make_tiny_bundle(tmp_path / "tiny")

    def build(source: Any, output: Any, config: BuildConfig, *, resume: bool, progress: Any) -> Bundle:
        asked.update(source=source, output=output, config=config, resume=resume)
        return Bundle(folder, read_manifest(folder))

    monkeypatch.setattr("moe_export.api.build", build)
    return asked


def test_no_flags_are_the_defaults(built: dict[str, Any], tmp_path: Path) -> None:
    result = invoke("build", "model", "-o", tmp_path / "out", "-q")
    assert result.exit_code == 0, result.output
    assert built == {"source": "model", "output": tmp_path / "out", "config": BuildConfig(), "resume": False}
    assert result.stdout.startswith("built ")


def test_every_flag_reaches_the_configuration(built: dict[str, Any]) -> None:
    flags = (
        "--target",
        "portable",
        "--dtype",
        "float16",
        "--task",
        "feature-extraction",
        "--no-verify",
        "--no-bench",
        "--max-batch",
        3,
        "--max-seq",
        99,
        "--expert-lowering",
        "loop",
        "--overwrite",
        "--threads",
        2,
        "--seed",
        7,
        "--tolerance",
        "logits=1e-3",
        "--tolerance",
        "moe.output=0.5",
        "--trust-remote-code",
        "--opset",
        21,
    )
    result = invoke("build", "model", "-o", "out", "-q", *flags)
    assert result.exit_code == 0, result.output
    assert built["config"] == BuildConfig(
        target="portable",
        dtype="float16",
        task="feature-extraction",
        verify=False,
        bench=False,
        max_batch=3,
        max_sequence=99,
        expert_lowering="loop",
        overwrite=True,
        threads=2,
        seed=7,
        trust_remote_code=True,
        opset=21,
        tolerances={"logits": 1e-3, "moe.output": 0.5},
    )


def test_flags_win_over_the_file(built: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "build.toml"
    file.write_text(
        '[build]\ndtype = "float16"\nverify = false\nmax_batch = 4\n[verify.tolerances]\nlogits = 0.5\n'
    )
    args = ("build", "model", "-o", "out", "-q", "--config", file)
    assert invoke(*args).exit_code == 0
    assert built["config"] == BuildConfig(
        dtype="float16", verify=False, max_batch=4, tolerances={"logits": 0.5}
    )
    assert invoke(*args, "--dtype", "float32", "--verify", "--max-batch", 8).exit_code == 0
    assert built["config"] == BuildConfig(max_batch=8, tolerances={"logits": 0.5})
    file.write_text("[build]\ndtipe = 1\n")
    result = invoke(*args)
    assert result.exit_code == 2
    assert "dtipe" in result.stderr


def test_json_holds_the_manifest(built: dict[str, Any]) -> None:
    found = json.loads(invoke("build", "model", "-o", "out", "-q", "--json").stdout)
    assert found["manifest"]["target"] == "onnxruntime"
    assert Path(found["path"]).is_dir()


def test_resume_is_asked_of_the_build(built: dict[str, Any]) -> None:
    assert invoke("build", "model", "-o", "out", "-q", "--resume").exit_code == 0
    assert built["resume"] is True


def test_failed_parity_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: Any, **kwargs: Any) -> Bundle:
        raise CheckFailed("out: parity failed")

    monkeypatch.setattr("moe_export.api.build", build)
    result = invoke("build", "model", "-o", "out", "-q")
    assert (result.exit_code, result.stderr) == (1, "error: out: parity failed\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mixtral as a Hugging Face folder, with a tokenizer of bytes."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("source")
    config = MixtralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


@pytest.mark.slow
def test_real_build_then_the_other_commands(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    args = ("build", source, "-o", out, "--no-bench", "--threads", 1)
    first = invoke(*args)
    assert first.exit_code == 0, first.output
    assert "verified: " in first.stdout
    assert f"report: {out / 'evidence' / 'report.html'}" in first.stdout
    again = invoke(*args)
    assert again.exit_code == 0
    assert "unchanged" in again.stderr
    refused = invoke(*args, "--seed", 1)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr

    assert invoke("verify", out, "-q").exit_code == 0
    text = invoke("run", out, "--prompt", "abc", "--max-new-tokens", 3, "-q")
    assert text.exit_code == 0, text.output
    of_source, of_bundle = (json.loads(invoke("inspect", p, "--json").stdout) for p in (source, out))
    public = ("total", "active", "active_without_embeddings")
    assert [of_source["parameters"][n] for n in public] == [of_bundle["parameters"][n] for n in public]
    sample = "some text to route " * 3
    usages = [
        json.loads(invoke("trace", p, "--data", "-", "--json", "-", "-q", input=sample).stdout)
        for p in (source, out)
    ]
    assert [u["counts"] for u in usages[0]["layers"]] == [u["counts"] for u in usages[1]["layers"]]

    exported = invoke("export", source, "-o", tmp_path / "onnx", "-q", "--json")
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "onnx" / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "last"),
    [(signal.SIGINT, 130, "interrupted; nothing was written"), (signal.SIGTERM, 143, None)],
)
def test_interrupted_build_leaves_nothing(
    source: Path, tmp_path: Path, number: signal.Signals, code: int, last: str | None
) -> None:
    command = [sys.executable, "-m", "moe_export", "build", str(source), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if line.startswith("trace"):
            process.send_signal(number)
    assert process.wait() == code
    if last is not None:
        assert lines[-1] == last
    assert list(tmp_path.iterdir()) == []


def test_quantize_reaches_the_configuration(built: dict[str, Any]) -> None:
    assert invoke("build", "model", "-o", "out", "-q", "--quantize", "int4").exit_code == 0
    assert built["config"].quantize == "int4"
    result = invoke("build", "model", "-o", "out", "-q", "--quantize", "int4", "--target", "portable")
    assert result.exit_code == 2 and "needs target onnxruntime" in result.output


def test_expert_parallel_flags_reach_the_configuration(built: dict[str, Any]) -> None:
    flags = ("--ep", 4, "--ep-mode", "alltoall", "--ep-overflow", "error", "--ep-capacity-factor", 1.5)
    placed = ("--placement", "balanced", "--trace", "t.json", "--redundant-experts", 2, "--ep-nodes", 2)
    result = invoke("build", "model", "-o", "out", "-q", *flags, *placed)
    assert result.exit_code == 0, result.output
    assert built["config"] == BuildConfig(
        ep=4,
        ep_mode="alltoall",
        ep_overflow="error",
        ep_capacity_factor=1.5,
        placement="balanced",
        trace="t.json",
        redundant_experts=2,
        ep_nodes=2,
    )
    result = invoke("build", "model", "-o", "out", "-q", "--ep", 2, "--placement", "balanced")
    assert result.exit_code == 2 and "balanced and trace belong together" in result.output


def test_the_number_of_layers_reaches_build_and_export(
    built: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = invoke("build", "model", "-o", "out", "-q", "--layers", 3)
    assert result.exit_code == 0, result.output
    assert built["config"] == BuildConfig(layers=3)
    asked: dict[str, Any] = {}
    monkeypatch.setattr("moe_export.api.export", lambda *args, **options: asked.update(options) or tmp_path)
    assert invoke("export", "model", "-o", "out", "-q", "--layers", 3).exit_code == 0
    assert asked["layers"] == 3
    assert invoke("export", "model", "-o", "out", "-q", "--layers", 0).exit_code == 2
