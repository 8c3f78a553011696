"""Hashes of the files in a folder that is being filled, without reading an unchanged file twice."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from moe_export.bundle.manifest import MANIFEST_NAME
from moe_export.bundle.names import path_fault, shown
from moe_export.digests import block_of, digest_file, remember_digest
from moe_export.errors import BundleError
from moe_export.progress import Progress
from moe_export.schema import FileEntry

_Stamp = tuple[int, int, int, int]
_SETTLED_NS = 1_000_000_000
"""A file is trusted to be unchanged only if its last change lay this far back when it was hashed: the file
system's clock is coarse, so a change soon after could leave the same time."""


class FolderHashes:
    """Lists and hashes a folder; a later call hashes only what is new or changed since."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[_Stamp, str]] = {}

    def know(self, relative: str, size: int, sha256: str) -> None:
        """Take over the hash of a file that was read elsewhere, if it still has that size and has been left
        alone for a while."""
        stamp = _stamp(self._folder / relative)
        if stamp[0] == size and time.time_ns() - stamp[1] > _SETTLED_NS:
            self._known[relative] = (stamp, sha256)

    def entries(self, progress: Progress) -> tuple[FileEntry, ...]:
        """Every file but the manifest, sorted by path.

        Raises:
            BundleError: a link, a device, or a name that a bundle must not hold.
            OSError: a file cannot be read.
        """
        stamps = {relative: _stamp(self._folder / relative) for relative in self._list()}
        known = {r: sha for r, (stamp, sha) in self._known.items() if stamps.get(r) == stamp}
        fresh = [relative for relative in stamps if relative not in known]
        with progress.stage("hash files", sum(stamps[relative][0] for relative in fresh)) as advance:
            for relative in fresh:
                settled = time.time_ns() - max(stamps[relative][1:3]) > _SETTLED_NS
                known[relative] = digest_file(self._folder / relative, advance)
                if settled:
                    self._known[relative] = (stamps[relative], known[relative])
        for relative in set(stamps) - set(fresh):
            self._remember(relative, known[relative])
        return tuple(
            FileEntry(relative, stamps[relative][0], known[relative], block_of(stamps[relative][0]))
            for relative in sorted(stamps)
        )

    def _remember(self, relative: str, digest: str) -> None:
        """Its second name gave a file another time of change; its content is what was hashed."""
        info = (self._folder / relative).lstat()
        if block_of(info.st_size):
            remember_digest(info, digest)

    def _list(self) -> list[str]:
        found = []
        for where, folders, names in os.walk(self._folder, onerror=_fail):
            for name in (*folders, *names):
                path = Path(where) / name
                relative = path.relative_to(self._folder).as_posix()
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode) or relative == MANIFEST_NAME:
                    continue
                if not stat.S_ISREG(mode):
                    raise BundleError(
                        f"{path} is not a plain file; a bundle holds copies, no links or devices"
                    )
                fault = path_fault(relative)
                if fault is not None:
                    raise BundleError(f"file name {shown(relative)} {fault}; a bundle cannot hold it")
                found.append(relative)
        return found


def _stamp(path: Path) -> _Stamp:
    """What changes when a file changes: size, times (the second cannot be set by hand), identity."""
    info = path.lstat()
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


def _fail(error: OSError) -> None:
    raise error
