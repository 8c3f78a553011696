"""Headers of safetensors files, read as JSON with every rule of the format checked; no weight is touched."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_export.errors import SourceError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a file: ``begin`` is its first byte from the file's start, ``nbytes`` its length."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Tensor name → where it lies, in the order of the file's bytes.

    Raises:
        SourceError: the file is not safetensors, is truncated, or its header breaks a rule; says which.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            if prefix + stream.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
                raise SourceError(
                    f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull` in its "
                    "folder"
                )
            if len(prefix) < 8:
                raise SourceError(f"{path} is truncated: {size} bytes, a safetensors file has at least 10")
            stream.seek(8)
            if stream.read(1) not in (b"{", b""):
                raise SourceError(
                    f"{path} is not a safetensors file, or its header is corrupt: it does not start with '{{'"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise SourceError(
                    f"{path} is not a safetensors file or is corrupt: its header claims {length} bytes "
                    f"(at most {MAX_HEADER_BYTES})"
                )
            if 8 + length > size:
                raise SourceError(
                    f"{path} is truncated: its header takes {8 + length} bytes, the file has {size}; "
                    "download or copy it again"
                )
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(path, text, 8 + length, size)


def _parse(path: Path, text: bytes, data_start: int, size: int) -> dict[str, HeaderEntry]:
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} has a corrupt header: {error}; download or copy it again") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError(f"{path} has a corrupt header: __metadata__ is not a table of texts")
    entries = {name: _entry(path, name, value, data_start) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    end, before = data_start, "the header"
    for name, entry in ordered.items():
        if entry.begin + entry.nbytes > size:
            raise SourceError(
                f"{path} is truncated: tensor {name!r} ends at byte {entry.begin + entry.nbytes}, the file "
                f"has {size}; "
                "download or copy it again"
            )
        if entry.begin != end:
            what = "overlaps" if entry.begin < end else "leaves a gap after"
            raise SourceError(f"{path} has a corrupt header: tensor {name!r} {what} {before!r}")
        end, before = entry.begin + entry.nbytes, name
    if end != size:
        raise SourceError(f"{path} is corrupt: {size - end} bytes after its last tensor belong to none")
    return ordered


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return result


def _entry(path: Path, name: str, value: Any, data_start: int) -> HeaderEntry:
    def corrupt(what: str) -> SourceError:
        return SourceError(f"{path} has a corrupt header: tensor {name!r}: {what}")

    if not isinstance(value, dict):
        raise corrupt("expected dtype, shape and data_offsets")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise corrupt(f"unknown dtype {dtype!r}; known: {', '.join(sorted(DTYPE_BITS))}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise corrupt(f"shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise corrupt(f"data_offsets {offsets!r} are not two numbers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise corrupt(f"data_offsets {offsets} are out of order")
    count = 1
    for size in shape:
        count *= size
        if count >= 1 << 64:  # the format's own library counts elements so, whatever sizes follow
            raise corrupt(f"{end - begin} bytes do not hold {dtype} of shape {shape}")
    bits = count * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        raise corrupt(f"{end - begin} bytes do not hold {dtype} of shape {shape}")
    return HeaderEntry(dtype, tuple(shape), data_start + begin, end - begin)
