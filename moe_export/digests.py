"""Hashes of files that may be as large as a model: by blocks, on all cores, without reading holes, and once.

A file of more than :data:`BLOCK` bytes is stood for by the SHA-256 of the SHA-256s of its blocks. Blocks are
hashed side by side, and one that lies in a hole of a sparse file is known to be zeros without being read: it
has the same hash as zeros that were written.

What was hashed is remembered beside the user's other caches with the file's device, inode, size and times. A
file that has all of them unchanged is not read again: no program can set the last of the times, so a write
shows. What a disk forgets by itself does not show; with ``MOE_EXPORT_DIGESTS=off`` everything is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from .files import read_json_object, sha256_file

BLOCK = 64 << 20
"""Bytes of a block; files of up to this size have their plain SHA-256."""
VARIABLE = "MOE_EXPORT_DIGESTS"
"""Environment variable: a folder for what is remembered, or ``off``."""
_READ = 1 << 20
_SETTLED_NS = 1_000_000_000
"""A file is taken for unchanged only if its last write lay this far back when it was hashed: clocks of file
systems are coarse."""
_MOST_REMEMBERED = 20_000

Advance = Callable[[int], None]


def block_of(size: int) -> int:
    """Bytes of the blocks that a file of ``size`` bytes is hashed in; 0: its plain SHA-256."""
    return BLOCK if size > BLOCK else 0


def digest_file(
    path: str | os.PathLike[str], advance: Advance | None = None, *, block: int | None = None
) -> str:
    """The hash of a file in hex. ``block``: as :func:`block_of` (None: by the file's size). ``advance`` is
    called with the bytes done since the last call, in this thread.

    Raises:
        OSError: the file cannot be read.
    """
    step = advance or _nothing
    with open(path, "rb") as stream:
        before = os.fstat(stream.fileno())
        block = block_of(before.st_size) if block is None else block
        if not block:
            return sha256_file(path, advance)
        known = recall(before, _sha256(block))
        if known is not None:
            step(before.st_size)
            return known
        digest = _by_blocks(stream.fileno(), before.st_size, block, step)
        remember(before, os.fstat(stream.fileno()), _sha256(block), digest)
    return digest


def remember_digest(info: os.stat_result, digest: str) -> None:
    """Keep the hash of a file that was hashed before it got these times, and has not been written since."""
    remember(info, info, _sha256(block_of(info.st_size)), digest)


def recall(info: os.stat_result, fact: str) -> str | None:
    """What was remembered as ``fact`` of the file that has this ``stat``; None when it changed since."""
    folder = _folder()
    if folder is None:
        return None
    held = read_json_object(folder / _key(info, fact))
    value = held.get("value") if held is not None else None
    return value if isinstance(value, str) else None


def remember(before: os.stat_result, after: os.stat_result, fact: str, value: str) -> None:
    """Keep ``value`` of a file, by what ``stat`` said before and after it was read. Nothing is kept of a file
    that changed meanwhile or short before; a cache that cannot be written is left alone."""
    folder = _folder()
    same = (before.st_size, before.st_mtime_ns, before.st_ino) == (
        after.st_size, after.st_mtime_ns, after.st_ino
    )  # fmt: skip
    if folder is None or not same or time.time_ns() - after.st_mtime_ns <= _SETTLED_NS:
        return
    if not block_of(after.st_size):  # read in no time
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _drop_old(folder)
        target = folder / _key(after, fact)
        draft = target.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"fact": fact, "value": value}), encoding="ascii")
        draft.replace(target)


def _folder() -> Path | None:
    asked = os.environ.get(VARIABLE, "")
    if asked == "off":
        return None
    if asked:
        return Path(asked)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "moe-export" / "digests"


def _sha256(block: int) -> str:
    return f"sha256 of blocks of {block}"


def _key(info: os.stat_result, fact: str) -> str:
    facts = (fact, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:40] + ".json"


def _drop_old(folder: Path) -> None:
    held = list(folder.glob("*.json"))
    if len(held) > _MOST_REMEMBERED:
        for path in sorted(held, key=lambda p: p.stat().st_mtime)[: len(held) // 2]:
            path.unlink(missing_ok=True)


def _by_blocks(descriptor: int, size: int, block: int, advance: Advance) -> str:
    """Hash of the hashes; two blocks per core are under way, so that memory stays small."""
    parts: dict[int, bytes] = {}
    threads = _cores()
    with _pool(threads) as pool:
        waiting = {}
        for begin in range(0, size, block):
            count = min(block, size - begin)
            if _hole(descriptor, begin, count):
                parts[begin] = _zeros(count)
                advance(count)
                continue
            waiting[pool.submit(_block, descriptor, begin, count)] = begin
            while len(waiting) >= 2 * threads:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    done_at = waiting.pop(future)
                    parts[done_at] = future.result()
                    advance(min(block, size - done_at))
        for future, begin in waiting.items():
            parts[begin] = future.result()
            advance(min(block, size - begin))
    return hashlib.sha256(b"".join(parts[begin] for begin in sorted(parts))).hexdigest()


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(max_workers=threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _block(descriptor: int, begin: int, count: int) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ, count)))
    done = 0
    while done < count:
        got = os.preadv(descriptor, [buffer[: min(len(buffer), count - done)]], begin + done)
        if not got:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        digest.update(buffer[:got])
        done += got
    return digest.digest()


def _hole(descriptor: int, begin: int, count: int) -> bool:
    """Whether these bytes were never written."""
    seek_data = getattr(os, "SEEK_DATA", None)
    if seek_data is None:
        return False
    try:
        return os.lseek(descriptor, begin, seek_data) >= begin + count
    except OSError as error:  # ENXIO: no data up to the file's end; others: no such thing here
        return error.errno == errno.ENXIO


@lru_cache(maxsize=64)
def _zeros(count: int) -> bytes:
    digest = hashlib.sha256()
    piece = bytes(_READ)
    for begin in range(0, count, _READ):
        digest.update(piece[: min(_READ, count - begin)])
    return digest.digest()


def _nothing(count: int) -> None:
    return None
