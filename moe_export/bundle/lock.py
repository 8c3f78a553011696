"""One build at a time per output folder, between processes.
 The lock is an advisory lock of the operating system on ``.<name>.lock`` beside the folder: it ends with the
process that holds it, however that ends, so a leftover lock file blocks nobody.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_export.errors import EnvironmentLacksError, MoeExportError, UsageError
from moe_export.files import bytes_text

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk or quota."""


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Hold the lock of the folder ``output`` (a resolved path whose parent exists).

    Raises:
        UsageError: another process holds it; the message names its process id. Or the parent cannot be
        written.
    """
    import filelock

    lock_path = output.with_name(f".{output.name}.lock")
    lock = filelock.FileLock(lock_path, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        holders = [str(pid) for _, pid in leftovers(output) if process_exists(pid)]
        who = f"process {', '.join(holders)} is" if holders else "another process is"
        raise UsageError(
            f"{who} writing to {output} now; wait for it, stop it, or choose another output folder with -o"
        ) from error
    except OSError as error:
        raise write_error(error, output) from error
    try:
        yield
    finally:
        # Removed while held: a process that opened it meanwhile sees an unlinked file and starts over.
        lock_path.unlink(missing_ok=True)
        lock.release()


def leftovers(output: Path) -> list[tuple[Path, int]]:
    """Temporary siblings of ``output`` that a writer made, with the writer's process id."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.(?:partial|replaced)-(\d+)-[0-9a-f]{{8}}")
    found = []
    for sibling in output.parent.iterdir():
        match = pattern.fullmatch(sibling.name)
        if match and sibling.is_dir() and not sibling.is_symlink():
            found.append((sibling, int(match[1])))
    return found


def process_exists(pid: int) -> bool:
    """Whether a process with this id lives on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_error(error: OSError, output: Path) -> MoeExportError:
    """An error of the file system while writing ``output``, as one clear error."""
    parent = output.parent
    if error.errno in NO_SPACE:
        return EnvironmentLacksError(no_space_text(output))
    if error.errno == errno.EFBIG:
        return EnvironmentLacksError(
            f"a file of {output} would be larger than this process or file system may write; raise the limit "
            "(`ulimit -f`) or choose another output folder with -o"
        )
    if error.errno == errno.EROFS:
        reason = "its file system is read-only"
    elif error.errno in (errno.EACCES, errno.EPERM):
        reason = "no permission"
    elif error.errno == errno.ENAMETOOLONG:
        return UsageError(f"the name {output.name!r} is too long for the file system; choose a shorter -o")
    else:
        reason = error.strerror or str(error)
    return UsageError(f"cannot write in {parent}: {reason}; choose another output folder with -o")


def no_space_text(output: Path) -> str:
    """``no space left in <parent> (<free> free)`` and how to fix it."""
    try:
        free = f" ({bytes_text(shutil.disk_usage(output.parent).free)} free)"
    except OSError:
        free = ""
    return f"no space left in {output.parent}{free}; free some or choose another output folder with -o"
