"""The export benchmark: checkpoints of a model's shapes, and what it says about a measurement."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from moe_export.importer.checkpoint import inspect_checkpoint
from tests.helpers.tools import tool as load_tool

CONFIG: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tool() -> Any:
    return load_tool("bench_export")


@pytest.mark.parametrize("sparse", [False, True])
def test_a_checkpoint_is_whole_and_sparse_ones_take_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Any, sparse: bool
) -> None:
    synthetic = sys.modules["synthetic_checkpoint"]
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 40_000)
    written = tool.write_checkpoint(tmp_path / "checkpoint", CONFIG, sparse=sparse)
    info = inspect_checkpoint(tmp_path / "checkpoint")
    assert info.total_bytes == written
    assert len(info.shards) > 1
    experts = [t for name, t in info.tensors.items() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3 and {t.dtype for t in experts} == {"BF16"}
    blocks = sum((tmp_path / "checkpoint" / s).stat().st_blocks for s in info.shards) * 512
    assert (blocks < written) == sparse


def test_a_presets_first_layers(tool: Any) -> None:
    synthetic = sys.modules["synthetic_checkpoint"]
    assert synthetic.config_of("deepseek-v3", 4)["num_hidden_layers"] == 4
    assert "quantization_config" not in synthetic.config_of("deepseek-v3", None)


def result(**changes: Any) -> dict[str, Any]:
    return {
        "model": "mixtral-8x7b", "layers": 4, "sparse": False, "fp8": False, "weight_bytes": 12_000_000_000,
        "load_average": 1.0, "read_s": [10.0, 14.0], "export_s": 30.0, "export_to_read": 3.0, "open_s": 1.0,
        "libraries_rss": 2**29, "export_rss": 2**30, "written_bytes": 12_000_000, "notes": ["a note"],
        **changes,
    }  # fmt: skip


def test_a_measurement_is_told(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tool.print_result(result(load_rss=2**30, run="logits [1, 1, 9], finite"))
    text = capsys.readouterr().out
    for part in (
        "12.0 GB |", "10.0 s and 14.0 s", "30.0 s, 3.00 times the faster read", "0.50 GiB above",
        "12.0 MB, 0.100%", "1.00 GiB", "logits [1, 1, 9], finite", "note: a note",
    ):  # fmt: skip
        assert part in text
    tool.print_result(result(sparse=True, layers=None, read_s=[], export_to_read=None))
    text = capsys.readouterr().out
    assert "all layers" in text and "12.0 GB, holes" in text and "there is nothing to read" in text
    assert "| 30.0 s |" in text and "times the" not in text


def test_what_is_over_its_limit_is_named(tool: Any) -> None:
    assert tool.misses(result(load_rss=19 * 10**8, written_bytes=11_000_000)) == []
    missed = tool.misses(
        result(export_rss=3 * 2**30, export_to_read=3.61, written_bytes=10**9, load_rss=21 * 10**8)
    )
    assert missed == [
        "export's memory above the libraries', GiB: 2.5, at most 1.5",
        "export's time in sequential reads: 3.61, at most 3.0",
        "share of the weights that was written: 0.0833, at most 0.01",
        "ONNX Runtime's memory, GB: 2.1, at most 2.0",
    ]


def test_what_was_not_measured_is_no_miss(tool: Any) -> None:
    assert tool.misses(result(sparse=True, layers=None, read_s=[], export_to_read=None)) == []
    assert tool.misses(result(layers=None, load_rss=9 * 10**9)) == [], "all layers"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nope"], "--model: no preset 'nope'"),
        (["--layers", "-1"], "--layers -1: mixtral-8x7b has 32"),
        (["--model", "switch-base-8"], "switch-base-8 is measured whole; give --layers 0"),
        (["--layers", "33"], "--layers 33: mixtral-8x7b has 32"),
        (["--folder", "nowhere"], "--folder nowhere: no such folder"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: no folder nowhere"),
        (["--check", "--sparse"], "leave out --sparse and --no-run"),
        (["--check", "--no-run"], "leave out --sparse and --no-run"),
    ],
)
def test_wrong_use_is_one_error_before_anything_is_written(
    tool: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main(words)
    assert caught.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_model_in_float8_is_measured_whole(tmp_path: Path, tool: Any) -> None:
    measured = tool.measure(tmp_path, CONFIG, None, sparse=False, fp8=True, run=True)
    assert measured["run"] == "logits [1, 1, 64], finite"
    assert measured["export_to_read"] > 0 and len(measured["read_s"]) == 2
    assert any("referenced" in note for note in measured["notes"])
    assert not (tmp_path / "export").exists()


def test_files_are_read_from_front_to_back(tmp_path: Path, tool: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20))
    assert tool._read_once([path]) > 0


def test_a_child_that_fails_ends_the_measurement(tool: Any) -> None:
    with pytest.raises(SystemExit, match="export failed: .*UsageError: weights: reference is for a model"):
        tool._child("export", "no-such-folder", "output", "20")
