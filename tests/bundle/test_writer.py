"""BundleWriter within one process: what it writes, what it refuses, what it leaves behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_export.bundle import BundleWriter, hashing, open_bundle, swap
from moe_export.errors import BundleError, EnvironmentLacksError, UsageError
from moe_export.progress import NullProgress
from tests.bundle.sample import fill, make_bundle, make_manifest, names


class Recorder:
    """A Progress that counts."""

    def __init__(self) -> None:
        self.stages: dict[str, list[int]] = {}
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def run() -> Any:
            self.stages[name] = [total or 0, 0]

            def advance(units: int) -> None:
                self.stages[name][1] += units

            yield advance

        return run()

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_commit_writes_a_complete_bundle_and_nothing_else(tmp_path: Path) -> None:
    progress = Recorder()
    with BundleWriter(tmp_path / "engine", progress=progress) as writer:
        fill(writer.path)
        assert not (tmp_path / "engine").exists()
        returned = writer.commit(make_manifest(tools={"onnxruntime": "1.2.3"}))
    assert returned == tmp_path / "engine"
    assert names(tmp_path) == ["engine"]
    data = json.loads((returned / "manifest.json").read_text())
    assert [entry["path"] for entry in data["files"]] == [
        "model.onnx",
        "tokenizer/tokenizer.json",
        "weights.bin",
    ]
    for entry in data["files"]:
        content = (returned / entry["path"]).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert data["tools"]["onnxruntime"] == "1.2.3"
    assert data["tools"]["numpy"] == np.__version__
    assert data["created"].endswith("+00:00")
    total = sum(entry["size"] for entry in data["files"])
    assert progress.stages["hash files"] == [total, total]
    assert open_bundle(returned).manifest.files


def test_the_files_of_the_bundle_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make_bundle(tmp_path / "engine")
    finally:
        os.umask(before)
    assert (tmp_path / "engine").stat().st_mode & 0o777 == 0o750


def test_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    output = make_bundle(tmp_path / "engine")
    before = (output / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="exists already.*-o.*--overwrite"), BundleWriter(output):
        pytest.fail("entered")
    assert (output / "manifest.json").read_bytes() == before
    assert names(tmp_path) == ["engine"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_overwrite_replaces_a_bundle(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    output = make_bundle(tmp_path / "engine", notes=("old",))
    if not exchange:
        monkeypatch.setattr(swap, "_renameat2", lambda *_: False)
    make_bundle(output, overwrite=True, notes=("new",))
    assert open_bundle(output).manifest.notes == ("new",)
    assert names(tmp_path) == ["engine"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_failed_overwrite_keeps_the_old_bundle(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_bundle(tmp_path / "engine", notes=("old",))
    if not exchange:
        monkeypatch.setattr(swap, "_renameat2", lambda *_: False)
        rename = Path.rename

        def refuse_new(self: Path, target: Path) -> Path:
            if ".partial-" in self.name:
                raise OSError(errno.EIO, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse_new)
    expected: tuple[type[Exception], str] = (UsageError, "Input/output error")
    if exchange:
        expected = (RuntimeError, "build failed")
    with pytest.raises(expected[0], match=expected[1]), BundleWriter(output, overwrite=True) as writer:
        fill(writer.path)
        if exchange:
            raise RuntimeError("build failed")
        writer.commit(make_manifest(notes=("new",)))
    assert open_bundle(output).manifest.notes == ("old",)
    assert names(tmp_path) == ["engine"]


def test_overwrite_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (precious / "manifest.json").write_text('{"name": "some web app"}')
    with pytest.raises(UsageError, match="replaces only bundles"), BundleWriter(precious, overwrite=True):
        pytest.fail("entered")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="replaces only bundles"), BundleWriter(file, overwrite=True):
        pytest.fail("entered")
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["file", "home"]


def test_overwrite_takes_an_empty_folder_and_a_link_to_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_bundle(tmp_path / "empty", overwrite=True)
    (tmp_path / "link").symlink_to("empty")
    make_bundle(tmp_path / "link", overwrite=True, notes=("new",))
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "empty").manifest.notes == ("new",)
    assert names(tmp_path) == ["empty", "link"]


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (lambda p: None, "missing/engine", "does not exist; make it with `mkdir -p"),
        (lambda p: (p / "file").write_text(""), "file/engine", "is not a folder"),
        (lambda p: (p / "link").symlink_to("nowhere"), "link", "link to nothing"),
        (lambda p: None, "n" * 300, "too long"),
        (lambda p: None, ".", "exists already"),
        (lambda p: None, "a\0b", "is not a usable path"),
        (lambda p: (p / "loop").symlink_to("loop"), "loop", "link to nothing|not a usable path"),
    ],
    ids=["no-parent", "parent-is-file", "dangling-link", "name-too-long", "dot", "nul", "loop"],
)
def test_unusable_outputs(tmp_path: Path, make: Any, output: str, message: str) -> None:
    make(tmp_path)
    before = names(tmp_path)
    with pytest.raises(UsageError, match=message), BundleWriter(tmp_path / output):
        pytest.fail("entered")
    assert names(tmp_path) == before


def test_required_bytes_are_asked_for_before_any_work(tmp_path: Path) -> None:
    with (
        pytest.raises(EnvironmentLacksError, match=r"needs about 1073741824\.0 GiB, .* are free"),
        BundleWriter(tmp_path / "engine", required_bytes=1 << 60),
    ):
        pytest.fail("entered")
    assert names(tmp_path) == []
    with BundleWriter(tmp_path / "engine", required_bytes=1) as writer:
        fill(writer.path)
        writer.commit(make_manifest())


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_whatever_ends_the_block_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), BundleWriter(tmp_path / "engine") as writer:
        fill(writer.path)
        raise error
    assert names(tmp_path) == []


def test_no_commit_leaves_nothing_and_an_error_after_commit_leaves_the_bundle(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "engine") as writer:
        fill(writer.path)
    assert names(tmp_path) == []
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "engine") as writer:
        fill(writer.path)
        writer.commit(make_manifest())
        raise RuntimeError("afterwards")
    open_bundle(tmp_path / "engine")
    assert names(tmp_path) == ["engine"]


def _link(folder: Path) -> None:
    (folder / "copy.bin").symlink_to("weights.bin")


def _folder_link(folder: Path) -> None:
    (folder / "more").symlink_to("tokenizer")


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (lambda p: (p / "model.onnx").unlink(), {}, "model_file 'model.onnx' is not among the listed files"),
        (_link, {}, "copy.bin is not a plain file"),
        (_folder_link, {}, "more is not a plain file"),
        (lambda p: os.mkfifo(p / "pipe"), {}, "pipe is not a plain file"),
        (lambda p: (p / "a\nb").write_text(""), {}, r"'a\\nb' contains the control character U\+000A"),
        (lambda p: (p / "a\\b").write_text(""), {}, "contains a backslash"),
        (lambda p: None, {"text": None, "model_file": "../x"}, "model_file '../x' is not among"),
        (lambda p: None, {"dtype": "fp32"}, "dtype 'fp32' is unknown; nearest: float32"),
        (lambda p: None, {"task": "chat"}, "task 'chat' is unknown"),
        (
            lambda p: None,
            {"evidence": {"parity": {"max": float("nan")}}},
            "manifest.evidence.parity.max is nan",
        ),
        (lambda p: None, {"evidence": {"bench": [np.float32(1)]}}, r"evidence.bench\[0\] is a numpy.float32"),
    ],
)
def test_commit_refuses_what_no_bundle_may_hold(
    tmp_path: Path, damage: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message), BundleWriter(tmp_path / "engine") as writer:
        fill(writer.path)
        damage(writer.path)
        writer.commit(make_manifest(**changes))
    assert names(tmp_path) == []


def test_stage_makes_a_bundle_that_opens_where_it_lies(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "engine") as writer:
        fill(writer.path)
        staged = writer.stage(make_manifest())
        assert staged.path == writer.path
        assert open_bundle(writer.path).manifest == staged.manifest
        (writer.path / "evidence").mkdir()
        (writer.path / "evidence" / "parity.json").write_text("{}")
        assert not (tmp_path / "engine").exists()
        writer.commit(make_manifest(evidence={"parity": {}}))
    final = open_bundle(tmp_path / "engine").manifest
    assert "evidence/parity.json" in [entry.path for entry in final.files]
    assert final.evidence == {"parity": {}}


def test_commit_hashes_again_only_what_changed_since_it_was_staged(tmp_path: Path) -> None:
    progress = Recorder()
    with BundleWriter(tmp_path / "engine", progress=progress) as writer:
        fill(writer.path)
        time.sleep(1.1)  # until then a file counts as just written
        writer.stage(make_manifest())
        model = (writer.path / "model.onnx").stat().st_size
        assert progress.stages["hash files"] == [model + 82, model + 82]
        writer.stage(make_manifest())
        assert progress.stages["hash files"] == [0, 0]
        weights = writer.path / "weights.bin"
        before = weights.stat()
        weights.write_bytes(bytes(80))
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        writer.commit(make_manifest())
        assert progress.stages["hash files"] == [80, 80]
    open_bundle(tmp_path / "engine")


def test_files_just_written_are_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system with a coarse clock (here half a second), a change can leave size and times as they
    were."""
    stamp, tick = hashing._stamp, 500_000_000

    def coarse(path: Path) -> tuple[int, int, int, int]:
        size, modified, changed, inode = stamp(path)
        return size, modified // tick * tick, changed // tick * tick, inode

    monkeypatch.setattr(hashing, "_stamp", coarse)
    path = tmp_path / "weights.bin"
    hashes = hashing.FolderHashes(tmp_path)
    for value in range(20):
        path.write_bytes(bytes([value]) * 80)
        (entry,) = hashes.entries(NullProgress())
        assert entry.sha256 == hashlib.sha256(bytes([value]) * 80).hexdigest()


def test_output_that_came_up_during_the_build_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="came into being"), BundleWriter(tmp_path / "engine") as writer:
        fill(writer.path)
        (tmp_path / "engine").mkdir()
        (tmp_path / "engine" / "mine").write_text("x")
        writer.commit(make_manifest())
    assert names(tmp_path) == ["engine"]
    assert names(tmp_path / "engine") == ["mine"]


def test_wrong_use(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "engine")
    with pytest.raises(BundleError, match="not open"):
        _ = writer.path
    with writer:
        fill(writer.path)
        writer.commit(make_manifest())
        with pytest.raises(BundleError, match="not open"):
            writer.commit(make_manifest())
    with pytest.raises(BundleError, match="used once"), writer:
        pytest.fail("entered")


def test_a_full_disk_reported_only_in_words_is_understood(tmp_path: Path) -> None:
    with (
        pytest.raises(EnvironmentLacksError, match="no space left in .* free.*nothing was written"),
        BundleWriter(tmp_path / "engine") as writer,
    ):
        fill(writer.path)
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : write: No space left on device")
    assert names(tmp_path) == []


def test_handlers_of_the_program_stay_and_ours_go(tmp_path: Path) -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with BundleWriter(tmp_path / "a"):
            assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with BundleWriter(tmp_path / "b"):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_writing_from_another_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=make_bundle, args=(tmp_path / "engine",))
    thread.start()
    thread.join()
    open_bundle(tmp_path / "engine")


def test_two_writers_of_one_output_in_one_process(tmp_path: Path) -> None:
    with (
        BundleWriter(tmp_path / "engine"),
        pytest.raises(UsageError, match=f"process {os.getpid()} is writing to"),
        BundleWriter(tmp_path / "engine"),
    ):
        pytest.fail("entered")
    with BundleWriter(tmp_path / "other"), BundleWriter(tmp_path / "engine"):
        pass
    assert names(tmp_path) == []
