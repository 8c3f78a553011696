"""An interrupted build goes on to the same bytes; a killed one leaves the old output or none."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from moe_export.backends import data_file
from moe_export.backends.data_file import JOURNAL, forget_journals, kept_files, write_data
from moe_export.bundle import BundleWriter, open_bundle
from moe_export.errors import EnvironmentLacksError, UsageError
from moe_export.progress import NullProgress
from tests.bundle.sample import child, make_bundle, names
from tests.export.test_by_reference import saved

DATA = "model.onnx.data"


class Counted(ir.LazyTensor):
    """A tensor that counts how often it is written."""

    def __init__(self, index: int, log: list[int]) -> None:
        array = np.random.default_rng(index).standard_normal((32, 8)).astype(np.float32)
        super().__init__(
            lambda: (log.append(index), ir.tensor(array))[1],
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape((32, 8)),
            name=f"w{index}",
        )


def tensors(log: list[int], count: int = 6) -> list[Counted]:
    return [Counted(index, log) for index in range(count)]


@pytest.fixture(autouse=True)
def noted_after_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file, "STEP", 1)


def cut(folder: Path, tensors_done: int) -> None:
    """As a process leaves the file that is killed within a tensor."""
    path = folder / DATA
    os.truncate(path, tensors_done * 1024 + 100)
    plan = (folder / f"{DATA}{JOURNAL}").read_text().split()[0]
    (folder / f"{DATA}{JOURNAL}").write_text(f"{plan} {tensors_done * 1024}\n")


def test_a_write_goes_on_after_the_last_whole_tensor(tmp_path: Path) -> None:
    log: list[int] = []
    made = write_data(tensors(log), tmp_path, DATA)
    whole = (tmp_path / DATA).read_bytes()
    assert log == list(range(6)) and len(whole) == 6 * 1024
    for index, tensor in enumerate(made):
        assert np.array_equal(tensor.numpy(), Counted(index, []).numpy())
    for done in (0, 1, 4, 6):
        if done < 6:
            cut(tmp_path, done)
        log.clear()
        write_data(tensors(log), tmp_path, DATA)
        assert log == list(range(done, 6))
        assert (tmp_path / DATA).read_bytes() == whole
    assert kept_files(tmp_path) == {tmp_path / DATA, tmp_path / f"{DATA}{JOURNAL}"}
    forget_journals(tmp_path)
    assert names(tmp_path) == [DATA] and not kept_files(tmp_path)


def test_files_of_other_tensors_and_broken_journals_start_over(tmp_path: Path) -> None:
    journal = tmp_path / f"{DATA}{JOURNAL}"
    for broken in ("other tensors", "nonsense", "ff", "too far", "none"):
        log: list[int] = []
        write_data(tensors([]), tmp_path, DATA)
        plan = journal.read_text().split()[0]
        if broken == "too far":
            journal.write_text(f"{plan} 99999\n")
        elif broken == "none":
            journal.unlink()
        elif broken != "other tensors":
            journal.write_text(broken)
        (tmp_path / DATA).write_bytes(b"x" * 6 * 1024)
        write_data(tensors(log, 5 if broken == "other tensors" else 6), tmp_path, DATA)
        assert log[0] == 0, broken
        assert b"xxxx" not in (tmp_path / DATA).read_bytes()


KILLED = """
from moe_export.backends import data_file
from tests.export.test_resume import resumable, Counted
at = int(sys.argv[2])
data_file.STEP = 1
note = data_file._note
calls = []
def kill(*given):
    note(*given)
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
data_file._note = kill
resumable(Path(sys.argv[1]), [], resume=False)
"""


def resumable(output: Path, log: list[int], *, resume: bool, key: str = "key") -> None:
    """A small build of a bundle whose weights are written by ``write_data``."""
    from tests.bundle.sample import fill, make_manifest

    with BundleWriter(output, key=key, resume=resume, overwrite=True, kept=kept_files) as writer:
        fill(writer.path)
        write_data(tensors(log), writer.path, DATA)
        forget_journals(writer.path)
        writer.commit(make_manifest())


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }


@pytest.mark.parametrize("at", [1, 3, 8])
@pytest.mark.parametrize("before", [False, True])
def test_a_killed_build_leaves_the_old_output_or_none_and_goes_on(
    tmp_path: Path, at: int, before: bool
) -> None:
    output = tmp_path / "bundle"
    if before:
        make_bundle(output)
        old = files(output)
    done = child(KILLED, output, at)
    done.communicate(timeout=120)
    assert done.returncode == -signal.SIGKILL
    if before:
        assert files(output) == old
        open_bundle(output)
    else:
        assert not output.exists()
    log: list[int] = []
    resumable(output, log, resume=True)
    assert log == list(range(min(at - 1, 6), 6))
    again: list[int] = []
    resumable(tmp_path / "whole", again, resume=False)
    assert again == list(range(6))
    assert files(output) == files(tmp_path / "whole")
    assert [e.sha256 for e in open_bundle(output).manifest.files] == [
        e.sha256 for e in open_bundle(tmp_path / "whole").manifest.files
    ]
    assert names(tmp_path) == ["bundle", "whole"]


@pytest.mark.parametrize(("resume", "key"), [(False, "key"), (True, "another source")])
def test_what_another_build_left_is_removed(tmp_path: Path, resume: bool, key: str) -> None:
    done = child(KILLED, tmp_path / "bundle", 4)
    done.communicate(timeout=120)
    log: list[int] = []
    resumable(tmp_path / "bundle", log, resume=resume, key=key)
    assert log == list(range(6)) and names(tmp_path) == ["bundle"]


def test_a_full_disk_leaves_what_can_be_gone_on_with_only_where_that_was_asked(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for resume, left in ((False, 0), (True, 1)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 1024 - 10, hard))
            try:
                with pytest.raises((EnvironmentLacksError, UsageError), match="larger than|no space"):
                    resumable(tmp_path / "bundle", [], resume=resume)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert len(names(tmp_path)) == left and not (tmp_path / "bundle").exists()
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    log: list[int] = []
    resumable(tmp_path / "bundle", log, resume=True)
    assert log == [3, 4, 5] and names(tmp_path) == ["bundle"]


EXPORT = """
import json, os, signal, sys
from moe_export import build
from moe_export.backends import data_file
from moe_export.importer import hollow, streamed
from tests.export.test_resume import Notes
hollow.SMALL = streamed.INLINE = 1024
data_file.STEP = 1
source, output, at, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "resume"
note, calls = data_file._note, []
def kill(*given):
    note(*given)
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
data_file._note = kill
notes = Notes()
build(source, output, target="onnxruntime", verify=False, bench=False, weights="stream", resume=resume,
      progress=notes)
print(json.dumps([len(calls), notes.texts]))
"""


class Notes(NullProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_real_build_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "source", torch.bfloat16, 4)
    runs = []
    for output, at, resume in (("a", 0, ""), ("b", 7, ""), ("b", 0, "resume")):
        runs.append(
            subprocess.run(
                [sys.executable, "-c", EXPORT, tmp_path / "source", tmp_path / output, str(at), resume],
                capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2],
            )  # fmt: skip
        )
    assert [run.returncode for run in runs] == [0, -signal.SIGKILL, 0], runs[-1].stderr
    (whole, _), (rest, notes) = (json.loads(runs[i].stdout.splitlines()[-1]) for i in (0, 2))
    assert rest == whole - 6 + 1 - 1
    assert any(note.startswith("going on with what process") for note in notes)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert names(tmp_path) == ["a", "b", "source"]
