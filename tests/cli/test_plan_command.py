"""``moe-export plan``, presets in ``inspect``, and the lists of presets and GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moe_export.cli.main import run_guarded


def invoke(*args: object) -> Result:
    from moe_export.cli.main import cli

    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_plan_as_text_and_json(tmp_path: Path) -> None:
    args = ("plan", "mixtral-8x7b", "--gpu", "h100", "--gpus", 8, "--context", 8192, "--batch", 64)
    text = invoke(*args, "--plot", tmp_path / "plan.png")
    assert text.exit_code == 0, text.output
    for words in (
        "PREDICTED",
        "fits: EP 8 alltoall",
        "bound by memory",
        "when it pays",
        "assumed:",
        "dense, same total",
    ):
        assert words in text.stdout
    assert (tmp_path / "plan.png").is_file()
    found = json.loads(invoke(*args, "--json").stdout)
    assert found["predicted"] is True
    assert found["gpus"] == 8
    assert found["workload"] == {"context": 8192, "batch": 64, "cache": "bfloat16"}
    assert f"{found['best']['decode']['tokens_per_s']:.0f} tokens/s" in text.stdout


def test_options_reach_the_plan() -> None:
    found = json.loads(
        invoke(
            "plan", "mixtral-8x7b", "--gpu", "H200", "--gpus", 2, "--dtype", "fp8", "--kv-dtype", "float8",
            "--ep-mode", "allreduce", "--zipf", 0.8, "--assume", "memory=1", "--json",
        ).stdout
    )  # fmt: skip
    assert found["gpu"]["name"] == "h200"
    assert found["model"]["weights"] == "float8"
    assert found["workload"]["cache"] == "float8"
    assert {o["mode"] for o in found["options"]} == {"single", "allreduce"}
    assert (found["routing"]["kind"], found["routing"]["exponent"]) == ("zipf", 0.8)
    assert found["assumptions"]["memory"] == 1.0
    assert found["imbalance"]["decode"]["over_uniform"] > 0


def test_trace_of_a_config(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"tokens": 10, "layers": [{"counts": [10, 8, 2, 0], "dropped": 0}]}))
    result = invoke("plan", tmp_path, "--gpus", 2, "--context", 32, "--trace", trace)
    assert result.exit_code == 0, result.output
    assert "routing as in trace.json" in result.stdout
    assert "longer than" not in result.stdout
    long = invoke("plan", tmp_path, "--gpus", 2, "--context", 128)
    assert "note: the context of 128 tokens is longer than the model's maximum of 64" in long.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plan", "mixtrl-8x7b"), "nearest: mixtral-8x7b"),
        (("plan", "mixtral-8x7b", "--gpu", "h1000"), "no GPU 'h1000'; nearest: h100"),
        (("plan", "mixtral-8x7b", "--batch", "-4"), "-4 is not in the range x>=1"),
        (("plan", "mixtral-8x7b", "--gpus", "0"), "0 is not in the range x>=1"),
        (("plan", "mixtral-8x7b", "--zipf", "-1"), "expected 0 or more"),
        (("plan", "mixtral-8x7b", "--zipf", "1", "--trace", "x.json"), "give one of them"),
        (("plan", "mixtral-8x7b", "--trace", "no-such.json"), "no-such.json: No such file"),
        (("plan", "mixtral-8x7b", "--assume", "memry=1"), "nearest: memory"),
        (("plan", "mixtral-8x7b", "--assume", "memory=1.5"), "memory is 1.5"),
        (("plan", "mixtral-8x7b", "--plot", "x.gif"), ".png, .svg"),
        (("plan", "mixtral-8x7b", "--dtype", "int3"), "no weight format 'int3'"),
        (("inspect", "deepseek-v4"), "nearest: deepseek-v3"),
        (("inspect", "mixtral-8x7b", "--context", "0"), "0 is not in the range x>=1"),
    ],
)
def test_wrong_use(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_export.cli.main import cli

    code = run_guarded(lambda: cli.main(list(args), standalone_mode=False))
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_malformed_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_export.cli.main import cli

    for text, message in (
        ("{", "not valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "mixtral", "hidden_size": -1}', "'hidden_size' is -1"),
    ):
        (tmp_path / "config.json").write_text(text)
        for command in ("inspect", "plan"):
            words = [command, str(tmp_path)]
            assert run_guarded(lambda words=words: cli.main(words, standalone_mode=False)) == 2
            assert message in capsys.readouterr().err


def test_inspect_a_preset() -> None:
    text = invoke("inspect", "deepseek-v3", "--context", 8192, "--batch", 4, "--dtype", "bfloat16")
    assert text.exit_code == 0, text.output
    for words in ("671.026 B", "routed experts", "36.7B", "70.27 kB per token", "GPUs needed", "0-57"):
        assert words in text.stdout
    found = json.loads(invoke("inspect", "deepseek-v3", "--json").stdout)
    assert found["parameters"]["total"] == 671_026_404_352
    assert found["parameters"]["active_without_embeddings"] == 36_625_603_584
    assert found["components"]["router"]["total"] == 58 * 256 * 7168
    assert found["needs"]["kv_cache"]["bytes_per_token"] == 70_272
    assert {gpu["gpu"] for gpu in found["needs"]["gpus"]} >= {"h100", "b200"}
    assert len(found["moe_layers"]) == 58


def test_lists() -> None:
    presets = json.loads(invoke("list", "presets", "--json").stdout)
    assert {"name", "total", "active", "experts", "top_k", "source", "weights"} <= set(presets[0])
    (mixtral,) = [p for p in presets if p["name"] == "mixtral-8x7b"]
    assert (mixtral["total"], mixtral["experts"], mixtral["top_k"]) == (46_702_792_704, 8, 2)
    assert "2 of 8" in invoke("list", "presets").stdout
    gpus = json.loads(invoke("list", "gpus", "--json").stdout)
    (h100,) = [g for g in gpus if g["name"] == "h100"]
    assert h100["bandwidth_bytes_per_s"] == 3.35e12
    assert "data sheet" in invoke("list", "gpus").stdout
