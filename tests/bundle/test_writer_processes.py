"""BundleWriter against the outside: signals, kill -9, other builds, full and read-only file systems."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_export.bundle import BundleWriter, open_bundle
from moe_export.errors import EnvironmentLacksError, UsageError
from tests.bundle.sample import child, fill, make_bundle, make_manifest, names

NOBODY = 65534

HOLD = """
with BundleWriter(Path(sys.argv[1]), overwrite=True) as writer:
    fill(writer.path)
    print("ready", flush=True)
    sys.stdin.readline()
    writer.commit(make_manifest())
"""


def _hold(output: Path) -> subprocess.Popen[str]:
    """A process in the middle of a build."""
    process = child(HOLD, output)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["ctrl-c", "sigterm", "sighup"],
)
def test_interrupted_build_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = _hold(tmp_path / "engine")
    assert any(".partial-" in name for name in names(tmp_path))
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert names(tmp_path) == []


def test_interrupted_overwrite_keeps_the_old_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path / "engine", notes=("old",))
    process = _hold(tmp_path / "engine")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert open_bundle(tmp_path / "engine").manifest.notes == ("old",)
    assert names(tmp_path) == ["engine"]


def test_killed_build_blocks_nobody_and_is_cleaned_up(tmp_path: Path) -> None:
    process = _hold(tmp_path / "engine")
    process.kill()
    process.communicate(timeout=30)
    left = names(tmp_path)
    assert len(left) == 2 and ".engine.lock" in left and "engine" not in left
    neighbour = tmp_path / f".other.partial-{process.pid}-0123abcd"
    neighbour.mkdir()
    lookalike = tmp_path / ".engine.partial-notes"
    lookalike.mkdir()
    make_bundle(tmp_path / "engine")
    assert names(tmp_path) == sorted(["engine", neighbour.name, lookalike.name])


KILLED_BETWEEN_RENAMES = """
from moe_export.bundle import swap
swap._renameat2 = lambda *_: False
rename = Path.rename
def rename_or_die(self, target):
    if ".partial-" in self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = rename_or_die
make_bundle(Path(sys.argv[1]), overwrite=True, notes=("new",))
"""


def test_killed_between_the_two_renames_the_old_bundle_comes_back(tmp_path: Path) -> None:
    make_bundle(tmp_path / "engine", notes=("old",))
    process = child(KILLED_BETWEEN_RENAMES, tmp_path / "engine")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "engine").exists()
    with pytest.raises(UsageError, match="exists already"), BundleWriter(tmp_path / "engine"):
        pytest.fail("entered")
    assert open_bundle(tmp_path / "engine").manifest.notes == ("old",)
    assert names(tmp_path) == ["engine"]


def test_concurrent_build_gets_one_clear_error(tmp_path: Path) -> None:
    process = _hold(tmp_path / "engine")
    with (
        pytest.raises(UsageError, match=f"process {process.pid} is writing to .*engine now.*-o"),
        BundleWriter(tmp_path / "engine"),
    ):
        pytest.fail("entered")
    _, errors = process.communicate("go\n", timeout=30)
    assert process.returncode == 0, errors
    open_bundle(tmp_path / "engine")
    assert names(tmp_path) == ["engine"]


RACE = """
from moe_export.errors import UsageError
print("ready", flush=True)
sys.stdin.readline()
try:
    make_bundle(Path(sys.argv[1]))
except UsageError as error:
    assert "writing to" in str(error) or "exists already" in str(error), error
    sys.exit(2)
"""


def test_of_builds_started_together_one_wins(tmp_path: Path) -> None:
    processes = [child(RACE, tmp_path / "engine") for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes == [0, 2, 2, 2], results
    open_bundle(tmp_path / "engine")
    assert names(tmp_path) == ["engine"]


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root and mount for a small file system; the ulimit test covers the code path")
    disk = tmp_path / "disk"
    disk.mkdir()
    _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk: Path) -> None:
    make_bundle(small_disk / "engine", notes=("old",))
    with (
        pytest.raises(
            EnvironmentLacksError, match=rf"no space left in {small_disk} \(.* free\).*nothing was"
        ),
        BundleWriter(small_disk / "engine", overwrite=True) as writer,
    ):
        fill(writer.path)
        (writer.path / "big.bin").write_bytes(bytes(4 << 20))
        pytest.fail("4 MiB fitted")
    assert names(small_disk) == ["engine"]
    assert open_bundle(small_disk / "engine").manifest.notes == ("old",)


def test_disk_that_fills_up_at_the_manifest(small_disk: Path) -> None:
    with (
        pytest.raises(EnvironmentLacksError, match="no space left"),
        BundleWriter(small_disk / "engine") as writer,
    ):
        fill(writer.path)
        free = shutil.disk_usage(small_disk).free
        (writer.path / "big.bin").write_bytes(bytes(free))
        writer.commit(make_manifest())
    assert names(small_disk) == []


def test_required_bytes_on_a_small_disk(small_disk: Path) -> None:
    with (
        pytest.raises(EnvironmentLacksError, match=r"needs about 2\.0 MiB"),
        BundleWriter(small_disk / "engine", required_bytes=2 << 20),
    ):
        pytest.fail("entered")


FILE_LIMIT = """
from moe_export.errors import EnvironmentLacksError
try:
    with BundleWriter(Path(sys.argv[1])) as writer:
        fill(writer.path)
        (writer.path / "big.bin").write_bytes(bytes(4 << 20))
except EnvironmentLacksError as error:
    print(error)
    sys.exit(3)
"""


def test_file_size_limit(tmp_path: Path) -> None:
    process = child(
        FILE_LIMIT,
        tmp_path / "engine",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "larger than this process or file system may write" in output
    assert names(tmp_path) == []


@pytest.fixture
def read_only_mount(tmp_path: Path) -> Iterator[Path]:
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root and mount; the permission test covers the code path")
    folder = tmp_path / "read-only"
    folder.mkdir()
    make_bundle(folder / "engine")
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,bind,ro", str(folder))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_read_only_file_system(read_only_mount: Path) -> None:
    with (
        pytest.raises(UsageError, match="cannot write in .*read-only.*-o"),
        BundleWriter(read_only_mount / "new"),
    ):
        pytest.fail("entered")
    open_bundle(read_only_mount / "engine")
    with (
        pytest.raises(UsageError, match="cannot write in"),
        BundleWriter(read_only_mount / "engine", overwrite=True),
    ):
        pytest.fail("entered")


def test_immutable_parent(tmp_path: Path) -> None:
    """Permission bits do not stop root; the immutable attribute does, and only shows when a file is made."""
    folder = tmp_path / "immutable"
    folder.mkdir()
    if shutil.which("chattr") is None:
        pytest.skip("chattr is not installed")
    done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"chattr +i is not permitted here: {done.stderr.strip()}")
    try:
        with (
            pytest.raises(UsageError, match="cannot write in .*no permission"),
            BundleWriter(folder / "engine"),
        ):
            pytest.fail("entered")
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    assert names(folder) == []


NO_PERMISSION = """
from moe_export.errors import UsageError
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
assert not os.access(Path(sys.argv[1]).parent, os.W_OK)
try:
    make_bundle(Path(sys.argv[1]))
except UsageError as error:
    print(error)
    sys.exit(2)
"""


def test_folder_without_permission() -> None:
    """As an ordinary user: permission bits do not stop root, so a child of root gives up its rights first."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        process = child(NO_PERMISSION, Path(name) / "engine", NOBODY)
        output, errors = process.communicate(timeout=60)
        os.chmod(name, 0o755)
        assert process.returncode == 2, errors
        assert f"cannot write in {name}: no permission" in output
        assert names(Path(name)) == []
