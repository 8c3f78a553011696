"""Putting a finished folder into place: atomic renames, synced to disk."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

from moe_export.errors import UsageError

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def sync_folder(folder: Path) -> None:
    """Force every file and folder below ``folder`` to disk."""

    def fail(error: OSError) -> None:
        raise error

    for where, _, names in os.walk(folder, topdown=False, onerror=fail):
        for name in names:
            _sync(os.path.join(where, name))
        if os.name == "posix":
            _sync(where)


def replace_folder(finished: Path, output: Path, aside: Path, overwrite: bool) -> Path | None:
    """Rename ``finished`` to ``output``; with ``overwrite``, in exchange for what is there.

    Returns: where the replaced folder now lies (to be removed), or None. A crash at any moment leaves the old
    or the new folder at ``output``; where the system offers no atomic exchange, the old one may lie at
    ``aside`` (a name that the next writer restores it from).

    Raises:
        UsageError: without ``overwrite``, the output has come into being meanwhile.
        OSError: the file system refuses; ``output`` is as before.
    """
    stale: Path | None = None
    if not os.path.lexists(output):
        try:
            if not _renameat2(finished, output, _RENAME_NOREPLACE):
                finished.rename(output)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise _came_up(output) from error
            raise
    elif not overwrite:
        raise _came_up(output)
    elif _renameat2(finished, output, _RENAME_EXCHANGE):
        stale = finished
    else:
        output.rename(aside)
        try:
            finished.rename(output)
        except BaseException:  # Ctrl-C included: the old folder must come back
            aside.rename(output)
            raise
        stale = aside
    if os.name == "posix":
        _sync(output.parent)
    return stale


def _came_up(output: Path) -> UsageError:
    return UsageError(
        f"{output} came into being during the build; choose another output folder with -o, or replace it "
        "with --overwrite"
    )


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Linux's rename with flags. False: this system or file system does not offer it."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
