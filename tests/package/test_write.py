"""A package is written whole or not at all, from a bundle that is what its manifest says."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

import moe_export
from moe_export.errors import BundleError, EnvironmentLacksError, UsageError
from moe_export.package import package_bundle

from .samples import names, onnx_bundle


def test_the_library_function_is_the_package(tmp_path: Path) -> None:
    made = moe_export.package(onnx_bundle(tmp_path / "bundle"), tmp_path / "repository", name="net")
    assert made.model == "net"


def test_an_existing_package_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "bundle")
    package_bundle(bundle, tmp_path / "repository", name="old")
    with pytest.raises(UsageError, match="exists already"):
        package_bundle(bundle, tmp_path / "repository", name="new")
    package_bundle(bundle, tmp_path / "repository", name="new", overwrite=True)
    assert not (tmp_path / "repository/old").exists()
    assert (tmp_path / "repository/new/config.pbtxt").is_file()


def test_another_kind_of_folder_is_never_replaced(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "bundle")
    other = onnx_bundle(tmp_path / "other")
    before = names(other)
    with pytest.raises(UsageError, match="replaces only packages"):
        package_bundle(bundle, other, overwrite=True)
    assert names(other) == before


@pytest.mark.parametrize("inside", ["bundle/repository", "."])
def test_package_and_bundle_do_not_lie_in_each_other(tmp_path: Path, inside: str) -> None:
    bundle = onnx_bundle(tmp_path / "bundle")
    before = names(bundle)
    with pytest.raises(UsageError, match="lie in each other|exists already"):
        package_bundle(bundle, tmp_path / inside)
    assert names(bundle) == before


def test_a_damaged_bundle_is_not_packaged(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "bundle")
    content = bytearray((bundle / "large.bin").read_bytes())
    content[99] ^= 1
    (bundle / "large.bin").write_bytes(content)
    with pytest.raises(BundleError, match="large.bin"):
        package_bundle(bundle, tmp_path / "repository")
    assert sorted(os.listdir(tmp_path)) == ["bundle"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    bundle = onnx_bundle(tmp_path / "bundle")
    if existing:
        package_bundle(bundle, tmp_path / "repository", name="old")
    before = names(tmp_path)
    done: list[str] = []

    def full(source: Path, target: Path) -> None:
        if done:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        done.append(str(target))
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(EnvironmentLacksError, match="no space left"):
        package_bundle(bundle, tmp_path / "repository", name="new", overwrite=True)
    assert done and names(tmp_path) == before


def test_where_no_link_is_possible_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    monkeypatch.setattr(os, "link", refuse)
    bundle = onnx_bundle(tmp_path / "bundle")
    made = package_bundle(bundle, tmp_path / "repository")
    copy = made.path / "bundle/1/large.bin"
    assert copy.read_bytes() == (bundle / "large.bin").read_bytes()
    assert not copy.samefile(bundle / "large.bin")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="not a moe-export bundle"):
        package_bundle(tmp_path / "empty", tmp_path / "repository")
