"""``client.py`` of a repository, by Triton's own client library, against ONNX Runtime behind the protocol."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from moe_export.package import package_bundle
from moe_export.package.triton_readme import has_client
from moe_export.runtime.session import load
from moe_export.schema import ModelIO, TensorSpec
from tests.bundle.sample import make_manifest
from tests.helpers.tiny_bundle import make_tiny_bundle, tiny_io

from .grpc_server import Run, serving
from .samples import IO, engine, onnx_bundle, tensorrt_bundle

PROMPT = [3, 5, 8, 13]


def session_run(model: Path) -> Run:
    session = onnxruntime.InferenceSession(model)
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def client_of(repository: Path) -> Any:
    spec = importlib.util.spec_from_file_location("packaged_client", repository / "client.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cache", [True, False])
def test_the_client_generates_what_the_runtime_does(tmp_path: Path, cache: bool) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny", cache=cache)
    made = package_bundle(bundle, tmp_path / "repository")
    with load(bundle, threads=1) as runtime:
        want = runtime.generate([PROMPT], max_new_tokens=12).token_ids[0]
    seen: list[list[int]] = []
    run = session_run(made.path / "tiny/1/model.onnx")

    def counted(feeds: dict[str, Any]) -> dict[str, Any]:
        seen.append(list(feeds["input_ids"].shape))
        return run(feeds)

    with serving("tiny", counted) as url:
        command = [sys.executable, made.path / "client.py", "--url", url, "--new", "12",
                   "--ids", ",".join(map(str, PROMPT))]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(part) for part in done.stdout.split(",")] == want
    assert len(want) > 2
    steps = [[1, 4], *([[1, 1]] * (len(want) - 1))]
    assert seen == (steps if cache else [[1, 4 + i] for i in range(len(want))])


def test_the_client_reads_text(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny")
    made = package_bundle(bundle, tmp_path / "repository")
    with load(bundle, threads=1) as runtime:
        want = runtime.generate("moe", max_new_tokens=5).texts
    with serving("tiny", session_run(made.path / "tiny/1/model.onnx")) as url:
        command = [sys.executable, made.path / "client.py", "--url", url, "--new", "5", "--text", "moe"]
        done = subprocess.run(command, capture_output=True, text=False, check=False)
    assert done.returncode == 0, done.stderr
    assert want is not None
    assert done.stdout.decode().rstrip("\n") == want[0].rstrip("\n")


def test_a_sequence_beyond_the_models_limit_is_refused(tmp_path: Path) -> None:
    made = package_bundle(make_tiny_bundle(tmp_path / "tiny"), tmp_path / "repository")
    model = client_of(made.path).Model(made.path, "127.0.0.1:1")
    with pytest.raises(SystemExit, match="more than the model's 64"):
        model.generate(PROMPT, 61)


@pytest.mark.parametrize(
    ("loads", "capacities"), [([3], [8]), ([11, 12], [8, 16]), ([9, 17, 15], [8, 16, 20])]
)
def test_void_answers_are_asked_for_again(tmp_path: Path, loads: list[int], capacities: list[int]) -> None:
    """An answer whose experts had too little room is never used."""
    bundle = tensorrt_bundle(tmp_path / "net", engine("a.plan"), io=_bucket_io())
    made = package_bundle(bundle, tmp_path / "repository")
    asked: list[int] = []

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        load = loads[len(asked)]
        asked.append(len(feeds["moe_capacity"]))
        valid = load <= asked[-1]
        logits = np.zeros((1, feeds["input_ids"].shape[1], 9), np.float32)
        logits[0, -1, 4 if valid else 7] = 1
        return {"logits": logits, "moe_max_load": np.array([1, load], np.int32)}

    with serving("net", run) as url:
        model = client_of(made.path).Model(made.path, url)
        model.share = 0.0
        assert model.generate(list(range(20)), 1) == [4]
    assert asked == capacities


def _bucket_io() -> ModelIO:
    return ModelIO(
        (TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"), IO.inputs[-1]),
        (
            TensorSpec("logits", "float32", ("batch", "sequence", 9), "logits"),
            TensorSpec("moe_max_load", "int32", (2,), "load"),
        ),
    )


def test_models_that_the_client_cannot_run_have_none(tmp_path: Path) -> None:
    made = package_bundle(onnx_bundle(tmp_path / "net"), tmp_path / "repository")
    assert not (made.path / "client.py").exists()
    assert "client.py" not in (made.path / "README.md").read_text()
    assert has_client(make_manifest(io=tiny_io()))
    more = TensorSpec("decoder_input_ids", "int64", ("batch", "length"), "token_ids")
    assert not has_client(make_manifest(io=ModelIO((*tiny_io().inputs, more), tiny_io().outputs)))
