"""Writing a folder whole or not at all: into a temporary sibling, renamed into place when complete."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from moe_export.bundle.lock import NO_SPACE, leftovers, no_space_text, output_lock, write_error
from moe_export.bundle.swap import replace_folder, sync_folder
from moe_export.errors import BundleError, EnvironmentLacksError, MoeExportError, UsageError
from moe_export.files import bytes_text, describe_path, read_json_object
from moe_export.progress import NullProgress, Progress

KEY_FILE = ".key"
"""File of a temporary folder: what its content follows from."""
_NO_SPACE_WORDS = ("No space left on device", "Disk quota exceeded")
_END_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class FolderWriter:
    """Makes the folder ``output``, whole or not at all. Subclasses say what kind of folder it is.

    ``with`` gives a writer whose :attr:`path` is a temporary sibling to fill; :meth:`place` renames it to
    ``output``. When the block ends otherwise (an error, Ctrl-C, SIGTERM, nothing placed) the temporary folder
    is removed. What a killed process left is removed by the next writer of the same output.

    ``required_bytes``: free space to ask for before any work. ``overwrite``: replace an existing folder of
    the same kind; another kind of folder is never replaced. ``key``: what the folder's content follows from.
    ``resume``: take over from a killed writer of the same key the files that ``kept`` names, and leave the
    temporary folder when the block ends with an error.

    Raises:
        UsageError: the output exists, its parent is missing or cannot be written, or another process writes
        there. EnvironmentLacksError: no space left.
    """

    what: str
    """One such folder, for messages: ``bundle``."""
    plural: str
    """Several of them: ``bundles``."""
    marker: str
    """JSON file at the top of such a folder."""
    marker_key: str
    """A key of the object in it; ``overwrite`` replaces what has it."""

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        required_bytes: int | None = None,
        key: str = "",
        resume: bool = False,
        kept: Callable[[Path], set[Path]] = lambda folder: set(),
        progress: Progress | None = None,
    ) -> None:
        self._asked = Path(output)
        self._key, self._resume, self._kept = key, resume, kept
        self._overwrite = overwrite
        self._required_bytes = required_bytes
        self._progress = progress or NullProgress()
        self._stack: ExitStack | None = None
        self._temporary: Path | None = None
        self._output = self._asked

    @property
    def path(self) -> Path:
        """The temporary folder to fill; only between entering and placing it."""
        if self._temporary is None:
            raise BundleError(
                f"the {self.what} is not open for writing: use it in a with-statement, before commit()"
            )
        return self._temporary

    def check(self) -> None:
        """Refuse the output now, as entering would, before long work that would be for nothing."""
        self._output = _resolve(self._asked)
        _check_parent(self._output)
        self._check_output()

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise BundleError(f"a {type(self).__name__} is used once")
        self.check()
        with ExitStack() as stack:
            stack.enter_context(_EndSignals())
            stack.enter_context(output_lock(self._output))
            begun = self._clean_leftovers()
            self._check_output()
            self._check_space(begun)
            stack.callback(self._remove_temporary)
            temporary = self._sibling("partial")
            try:
                if begun is None:
                    temporary.mkdir()
                else:
                    begun.rename(temporary)
                if self._key:
                    (temporary / KEY_FILE).write_text(self._key, encoding="utf-8")
            except OSError as error:
                raise write_error(error, self._output) from error
            self._temporary = temporary
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._stack is not None  # set by __enter__
        translated: MoeExportError | None = None
        if isinstance(error, Exception) and not isinstance(error, EnvironmentLacksError):
            if says_no_space(error):
                first_line = str(error).strip().partition("\n")[0][:200]
                translated = EnvironmentLacksError(
                    f"{no_space_text(self._output)}; nothing was written ({first_line})"
                )
            elif isinstance(error, OSError) and error.errno == errno.EFBIG:
                translated = write_error(error, self._output)
        if error is not None and self._resume and self._temporary is not None:
            self._leave()
        self._stack.close()
        if translated is not None:
            raise translated from error

    def place(self) -> Path:
        """Give what lies in :attr:`path` its name; returns the output folder.

        Raises:
            UsageError, EnvironmentLacksError: the file system refuses.
        """
        temporary = self.path
        (temporary / KEY_FILE).unlink(missing_ok=True)
        try:
            sync_folder(temporary)
            stale = replace_folder(temporary, self._output, self._sibling("replaced"), self._overwrite)
        except OSError as error:
            if says_no_space(error):
                raise
            raise write_error(error, self._output) from error
        # From here on the output is complete; what lies at `stale`, the replaced folder, is to be removed.
        self._temporary = stale
        self._remove_temporary()
        return self._asked

    def _check_output(self) -> None:
        output = self._output
        if not output.exists() and not output.is_symlink():
            return
        if not self._overwrite:
            raise UsageError(
                f"{self._asked} exists already; choose another output folder with -o, or replace it with "
                "--overwrite"
            )
        replaceable = output.is_dir() and (
            self.marker_key in (read_json_object(output / self.marker) or {}) or not any(output.iterdir())
        )
        if not replaceable:
            raise UsageError(
                f"{self._asked} {describe_path(output)}; --overwrite replaces only {self.plural} and empty "
                "folders, so choose another output folder with -o"
            )

    def _check_space(self, begun: Path | None) -> None:
        """``begun``: what is there already."""
        if self._required_bytes is None:
            return
        free = shutil.disk_usage(self._output.parent).free
        if begun is not None:
            free += sum(path.stat().st_size for path in self._kept(begun) if path.is_file())
        if free < self._required_bytes:
            raise EnvironmentLacksError(
                f"no space for the {self.what} in {self._output.parent}: it needs about "
                f"{bytes_text(self._required_bytes)}, {bytes_text(free)} are free; free some or choose "
                "another output "
                "folder with -o"
            )

    def _sibling(self, what: str) -> Path:
        return self._output.with_name(f".{self._output.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")

    def _leave(self) -> None:
        """Let the temporary folder lie, if there is something in it to go on with."""
        assert self._temporary is not None
        if (self._temporary / KEY_FILE).is_file() and self._kept(self._temporary):
            self._progress.note("what was written is kept; --resume goes on with it")
            self._temporary = None

    def _clean_leftovers(self) -> Path | None:
        """Remove what killed writers of this output left, and return what of it can be gone on with. The lock
        is held, so no living writer owns any of it."""
        begun: Path | None = None
        for path, pid in leftovers(self._output):
            if ".replaced-" in path.name and not self._output.exists():
                # Killed between two renames: the old bundle was set aside and the new one not yet in place.
                path.rename(self._output)
                self._progress.note(f"restored {self._output.name}, which a killed build had set aside")
                continue
            if self._resume and begun is None and self._key and _key_of(path) == self._key:
                begun = path
                _keep_only(path, self._kept(path))
                self._progress.note(f"going on with what process {pid} wrote")
                continue
            shutil.rmtree(path, ignore_errors=True)
            self._progress.note(f"removed {path.name}, left by process {pid} which was killed")
        return begun

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if self._temporary.exists():
                self._progress.note(
                    f"could not remove {self._temporary}; the next build to this output tries again"
                )
            self._temporary = None


def _key_of(folder: Path) -> str | None:
    try:
        return (folder / KEY_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _keep_only(folder: Path, kept: set[Path]) -> None:
    """Remove every other file, and links, below ``folder``; folders stay only where something is kept."""
    for where, folders, names in os.walk(folder, topdown=False):
        for name in names:
            if Path(where, name) not in kept:
                Path(where, name).unlink()
        for name in folders:
            path = Path(where, name)
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()


class _EndSignals(AbstractContextManager[None]):
    """Turns signals that end a process by default into SystemExit, so that the block around is left in order.

    Only in the main thread, and only where the program has no handler of its own.
    """

    def __init__(self) -> None:
        self._taken: list[signal.Signals] = []

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _END_SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, _end)
                    self._taken.append(number)

    def __exit__(self, *error: object) -> None:
        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _resolve(output: Path) -> Path:
    """The folder that ``output`` means: links are followed, so that two spellings share one lock."""
    if "\0" in str(output):
        raise UsageError(f"output folder {str(output)!r} is not a usable path: it contains a NUL character")
    try:
        if output.is_symlink() and not output.exists():
            raise UsageError(
                f"{output} is a link to nothing; remove it or choose another output folder with -o"
            )
        return output.resolve() if output.exists() else output.parent.resolve() / output.name
    except OSError as error:
        raise write_error(error, output) from error
    except RuntimeError as error:  # a loop of links
        raise UsageError(f"output folder {str(output)!r} is not a usable path: {error}") from error


def _check_parent(output: Path) -> None:
    parent = output.parent
    if not parent.exists():
        raise UsageError(f"{parent} does not exist; make it with `mkdir -p {parent}` or choose another -o")
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder; choose another output folder with -o")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"cannot write in {parent}: no permission or a read-only file system; choose another output "
            "folder with -o"
        )


def says_no_space(error: BaseException) -> bool:
    """Whether an error, or one it came from, is about a full disk; C++ libraries say so only in their
    text."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in NO_SPACE:
            return True
        if any(words in str(current) for words in _NO_SPACE_WORDS):
            return True
        current = current.__cause__ or current.__context__
    return False
