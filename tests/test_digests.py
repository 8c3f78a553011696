"""Hashes by blocks: holes, threads and what is remembered change nothing about them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from moe_export import digests
from moe_export.bundle import BundleWriter, open_bundle
from moe_export.digests import digest_file
from moe_export.errors import BundleError

from .bundle.sample import fill, make_manifest

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Blocks of 1 MiB, and a cache of the test's own."""
    monkeypatch.setattr(digests, "BLOCK", MIB)
    monkeypatch.setenv(digests.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_hand(content: bytes) -> str:
    parts = [content[i : i + MIB] for i in range(0, len(content), MIB)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def settled(path: Path) -> None:
    """As if it had been written long ago."""
    os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize("size", [MIB + 1, 3 * MIB, 5 * MIB + 77])
def test_large_files_are_hashed_by_blocks(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    path = tmp_path / "weights"
    path.write_bytes(content)
    steps: list[int] = []
    assert digest_file(path, steps.append) == by_hand(content)
    assert sum(steps) == size
    plain = hashlib.sha256(content).hexdigest()
    assert digest_file(path, block=0) == plain != by_hand(content)
    changed = bytearray(content)
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert digest_file(path) == by_hand(bytes(changed)) != by_hand(content)


def test_small_files_have_their_plain_hash(tmp_path: Path, small_blocks: Path) -> None:
    path = tmp_path / "config"
    path.write_bytes(b"x" * MIB)
    settled(path)
    assert digest_file(path) == hashlib.sha256(b"x" * MIB).hexdigest()
    assert not small_blocks.exists()


def test_holes_hash_as_the_zeros_that_they_read_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    with sparse.open("wb") as stream:
        stream.write(b"header")
        stream.seek(4 * MIB + 5)
        stream.write(b"middle")
        stream.truncate(9 * MIB + 3)
    dense.write_bytes(sparse.read_bytes())
    read: list[int] = []
    block = digests._block
    monkeypatch.setattr(digests, "_block", lambda d, begin, n: (read.append(begin), block(d, begin, n))[1])
    found = digest_file(sparse)
    assert len(read) <= 3  # the blocks with data, where the file system knows holes
    assert found == digest_file(dense) == by_hand(dense.read_bytes())


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * (2 * MIB + 1))
    settled(path)
    first = digest_file(path)

    def no_reading(*_: object) -> bytes:
        raise AssertionError("the file was read")

    with monkeypatch.context() as inner:
        inner.setattr(digests, "_block", no_reading)
        steps: list[int] = []
        assert digest_file(path, steps.append) == first and sum(steps) == 2 * MIB + 1
        # Nothing but the whole stat will do: not the times alone that a program can set.
        with path.open("r+b") as stream:
            stream.write(b"b")
        settled(path)
        with pytest.raises(AssertionError, match="was read"):
            digest_file(path)
    assert digest_file(path) != first
    monkeypatch.setenv(digests.VARIABLE, "off")
    monkeypatch.setattr(digests, "_block", no_reading)
    with pytest.raises(AssertionError, match="was read"):
        digest_file(path)


def test_what_is_remembered_is_what_was_read(tmp_path: Path, small_blocks: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * (2 * MIB))
    before = path.stat()
    digests.remember(before, before, "fact", "value")  # written just now
    assert digests.recall(path.stat(), "fact") is None
    settled(path)
    now = path.stat()
    digests.remember(before, now, "fact", "value")  # changed while it was read
    assert digests.recall(now, "fact") is None
    digests.remember(now, now, "fact", "value")
    assert digests.recall(now, "fact") == "value" and digests.recall(now, "other") is None
    for file in small_blocks.iterdir():
        file.write_text("no JSON")
    assert digests.recall(now, "fact") is None


def test_a_cache_that_cannot_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(digests.VARIABLE, str(tmp_path / "file" / "below"))
    path = tmp_path / "weights"
    path.write_bytes(b"a" * (2 * MIB))
    settled(path)
    assert digest_file(path) == digest_file(path)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * (3 * MIB))
    monkeypatch.setattr(digests, "_hole", lambda *_: bool(os.truncate(path, MIB)))
    with pytest.raises(OSError, match="became shorter"):
        digest_file(path)


def test_a_bundles_large_files_are_checked_by_blocks_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(np.random.default_rng(0).bytes(3 * MIB))
    settled(weights)
    digest = digest_file(weights)
    with BundleWriter(tmp_path / "bundle") as writer:
        fill(writer.path)
        os.link(weights, writer.path / "large.bin")
        writer.know("large.bin", 3 * MIB, digest)
        writer.commit(make_manifest())
    with monkeypatch.context() as inner:
        inner.setattr(digests, "_block", lambda *_: pytest.fail("the file was read"))
        bundle = open_bundle(tmp_path / "bundle")
    entry = next(e for e in bundle.manifest.files if e.path == "large.bin")
    assert (entry.sha256, entry.block) == (digest, MIB)
    assert {e.block for e in bundle.manifest.files if e.size <= MIB} == {0}
    weights.unlink()  # another time of change: read once more, and found sound
    open_bundle(tmp_path / "bundle")
    with (tmp_path / "bundle" / "large.bin").open("r+b") as stream:
        stream.seek(2 * MIB)
        stream.write(b"damage")
    with pytest.raises(BundleError, match="large.bin .* has SHA-256"):
        open_bundle(tmp_path / "bundle")
    open_bundle(tmp_path / "bundle", trust=True)
