"""``moe-export run``, ``trace`` and ``inspect`` on a small bundle that was written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from moe_export.cli.main import cli
from moe_export.runtime.session import load
from tests.helpers.tiny_bundle import make_tiny_bundle

TEXT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("run") / "bundle")


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("run") / "bundle", tokenizer=False)


def invoke(*args: object, **options: Any) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], **options)


def test_prompt_gives_what_the_library_gives(bundle: Path) -> None:
    with load(bundle) as session:
        expected = session.generate("hello", max_new_tokens=12)
    assert expected.texts is not None
    streamed = invoke("run", bundle, "--prompt", "hello", "--max-new-tokens", 12)
    assert streamed.exit_code == 0, streamed.output
    assert streamed.stdout == expected.texts[0] + "\n"
    assert f"{expected.new_tokens} new tokens" in streamed.stderr
    found = json.loads(invoke("run", bundle, "--prompt", "hello", "--max-new-tokens", 12, "--json").stdout)
    assert found["texts"] == expected.texts
    assert found["token_ids"] == expected.token_ids
    assert found["finish_reasons"] == expected.finish_reasons


def test_prompt_on_stdin(bundle: Path) -> None:
    given = invoke("run", bundle, "--prompt", "hello", "--max-new-tokens", 6, "-q")
    piped = invoke("run", bundle, "--max-new-tokens", 6, "-q", input="hello\n")
    assert piped.stdout == given.stdout
    assert piped.stderr == ""
    broken = invoke("run", bundle, input=b"\xff\xfe")
    assert broken.exit_code == 2
    assert "stdin: not UTF-8" in broken.stderr


def test_drawing_is_seeded(bundle: Path) -> None:
    args = ("run", bundle, "--prompt", "a", "-q", "--json", "--top-k", 50, "--max-new-tokens", 16)
    one, same, other = (json.loads(invoke(*args, "--seed", s).stdout)["token_ids"] for s in (1, 1, 2))
    assert one == same
    assert one != other


def test_stop_text_ends_the_answer(bundle: Path) -> None:
    whole = json.loads(
        invoke("run", bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", 20, "--json").stdout
    )
    stop = next(c for c in whole["texts"][0][3:] if c != "\ufffd")
    cut = invoke("run", bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", 20, "--stop", stop, "--json")
    found = json.loads(cut.stdout)
    assert found["finish_reasons"] == ["stop"]
    assert whole["texts"][0].startswith(found["texts"][0])
    assert stop not in found["texts"][0]


def test_engine_without_tokenizer_takes_and_gives_ids(wordless: Path) -> None:
    result = invoke("run", wordless, "--prompt-ids", "0,5,9", "--max-new-tokens", 4, "-q")
    with load(wordless) as session:
        ids = session.generate([0, 5, 9], max_new_tokens=4).token_ids[0]
    assert result.stdout.split() == [str(i) for i in ids]
    refused = invoke("run", wordless, "--prompt", "hello")
    assert refused.exit_code == 2
    assert "no tokenizer" in refused.stderr


def test_tensors_in_and_out(bundle: Path, tmp_path: Path) -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    np.savez(tmp_path / "in.npz", input_ids=ids)
    result = invoke("run", bundle, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    with load(bundle) as session:
        expected = session.run({"input_ids": ids})
    with np.load(tmp_path / "out.npz") as found:
        assert set(found.files) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", "out.npz"]


def test_wrong_tensor_files(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "object.npz", input_ids=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "unknown.npz", words=np.zeros(3))
    for name, message in {
        "missing.npz": "No such file",
        "text.npz": "not an .npz file",
        "one.npy": "one array without a name",
        "object.npz": "not an .npz file of plain arrays",
        "unknown.npz": "words",
    }.items():
        result = invoke("run", bundle, "--inputs", tmp_path / name, "--outputs", out)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert not out.exists()
    np.savez(tmp_path / "in.npz", input_ids=np.array([[1]]))
    result = invoke("run", bundle, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "no" / "out.npz")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "a", "--prompt-ids", "1"], "exclude each other"),
        (["--prompt", "a", "--inputs", "x.npz", "--outputs", "y.npz"], "exclude each other"),
        (["--inputs", "x.npz"], "belong together"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "3"], "no effect with temperature 0"),
        (["--prompt-ids", "-1"], "whole numbers of at least 0"),
        (["--prompt-ids", "999999"], "999999"),
    ],
)
def test_wrong_use_of_run(bundle: Path, args: list[str], message: str) -> None:
    result = invoke("run", bundle, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_damaged_bundle(tmp_path: Path) -> None:
    damaged = make_tiny_bundle(tmp_path / "bundle")
    data = bytearray((damaged / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (damaged / "model.onnx.data").write_bytes(data)
    result = invoke("run", damaged, "--prompt", "a")
    assert result.exit_code == 2
    assert "model.onnx.data" in result.stderr
    assert invoke("run", damaged, "--prompt", "a", "--trust").exit_code == 0


def test_trace_of_a_bundle(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    result = invoke(
        "trace", bundle, "--data", tmp_path / "text.txt", "--json", tmp_path / "u.json",
        "--plot", tmp_path / "u.svg", "--window", 10,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    usage = json.loads((tmp_path / "u.json").read_text())
    assert usage["tokens"] == len(TEXT.encode())
    windows = len(TEXT.encode()) // 10
    assert (usage["window"], usage["windows"]) == (10, windows)
    assert result.stdout.startswith(f"{usage['tokens']} tokens; p50, p95, max: of max/mean over {windows} ")
    assert "<svg" in (tmp_path / "u.svg").read_text()

    counts = np.zeros((2, 4), int)
    with load(bundle) as session:
        assert session.tokenizer is not None
        ids = session.tokenizer.encode(TEXT).ids
        for start in range(0, len(ids), 10):
            run = session.run_traced({"input_ids": np.array([ids[start : start + 10]])})
            for i, layer in enumerate(run.layers):
                counts[i] += np.bincount(layer.expert_ids.reshape(-1), minlength=4)
    assert [layer["counts"] for layer in usage["layers"]] == counts.tolist()
    assert all(sum(layer["counts"]) == 2 * usage["tokens"] for layer in usage["layers"])

    piped = invoke("trace", bundle, "--data", "-", "--json", "-", "--window", 10, "-q", input=TEXT)
    assert json.loads(piped.stdout) == usage
    few = invoke("trace", bundle, "--data", "-", "--json", "-", "--max-tokens", 7, "-q", input=TEXT)
    assert json.loads(few.stdout)["tokens"] == 7


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        (["--data", "-"], "", "the text is empty"),
        (["--data", "no-such-file"], "", "no-such-file: No such file"),
        (["--data", "-", "--plot", "u.gif"], "abc", ".png, .svg"),
        (["--data", "-", "--window", "0"], "abc", "0 is not in the range"),
    ],
)
def test_wrong_use_of_trace(bundle: Path, args: list[str], text: str, message: str) -> None:
    result = invoke("trace", bundle, *args, "-q", input=text)
    assert result.exit_code == 2
    assert message in result.stderr


def test_trace_needs_a_tokenizer(wordless: Path) -> None:
    result = invoke("trace", wordless, "--data", "-", "-q", input="abc")
    assert result.exit_code == 2
    assert "no tokenizer.json" in result.stderr


def test_inspect_of_a_bundle(bundle: Path) -> None:
    found = json.loads(invoke("inspect", bundle, "--json").stdout)
    assert found["kind"] == "bundle"
    assert set(found["parameters"]) == {"total", "active", "active_without_embeddings"}
    assert [layer["num_experts"] for layer in found["moe_layers"]] == [4, 4]
    assert found["details"]["target"] == "onnxruntime"
    text = invoke("inspect", bundle)
    assert text.exit_code == 0
    assert "layers.1.moe" in text.stdout


def test_inspect_of_a_damaged_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 2
    assert "manifest.json" in result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mixtral as a Hugging Face folder, with a tokenizer of bytes."""
    from moe_export.models.families import tiny_model
    from tests.helpers.tiny_bundle import write_tiny_tokenizer

    folder = tmp_path_factory.mktemp("source")
    tiny_model("mixtral").save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


def test_trace_of_a_source_model(source: Path) -> None:
    text = "plain ascii " * 4
    result = invoke("trace", source, "--data", "-", "--json", "-", "--window", 16, "-q", input=text)
    assert result.exit_code == 0, result.output
    usage = json.loads(result.stdout)
    assert usage["tokens"] == len(text)
    assert [layer["name"] for layer in usage["layers"]] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert all(sum(layer["counts"]) == 2 * len(text) for layer in usage["layers"])
    (source / "tokenizer.json").unlink()
    refused = invoke("trace", source, "--data", "-", "-q", input=text)
    assert refused.exit_code == 2
    assert "no tokenizer.json" in refused.stderr
