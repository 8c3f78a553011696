"""The C++ program of docs/cpp-runtime.md: built, and its tokens compared with the Python runtime's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

import moe_export
from moe_export.models.families import tiny_model

from .kernels import plugin

ROOT = Path(__file__).resolve().parents[2]
PROMPT, NEW = [5, 6, 7, 8], 12


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


def onnxruntime_library() -> Path:
    """The C library inside the Python wheel."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this wheel of ONNX Runtime holds no C library")
    return found[0]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None and not os.environ.get("CI"):
        pytest.skip("no cmake")
    folder = tmp_path_factory.mktemp("cpp")
    for command in (["-S", ROOT / "examples" / "cpp", "-B", folder], ["--build", folder]):
        done = run("cmake", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run_bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "bundle"
    moe_export.build(tiny_model("mixtral"), path, target="onnxruntime", verify=False, bench=False)
    return path


@pytest.mark.slow
def test_the_program_generates_what_python_generates(program: Path, bundle: Path) -> None:
    with moe_export.load(bundle, threads=1) as session:
        want = session.generate([PROMPT], max_new_tokens=NEW).token_ids[0]
    for library in (str(plugin()), "-"):
        done = run(program, onnxruntime_library(), bundle, library, str(NEW), *map(str, PROMPT))
        assert done.returncode == 0, done.stderr
        assert [int(token) for token in done.stdout.split()][: len(want)] == want


@pytest.mark.slow
def test_the_program_says_what_is_wrong(program: Path, bundle: Path, tmp_path: Path) -> None:
    assert "usage: " in run(program).stderr
    absent = run(program, tmp_path / "absent.so", bundle, "-", "1", "5")
    assert (absent.returncode, "absent.so" in absent.stderr) == (1, True)
    no_plugin = run(program, onnxruntime_library(), bundle, tmp_path / "absent.so", "1", "5")
    assert (no_plugin.returncode, "absent.so" in no_plugin.stderr) == (1, True)
