"""Writing a model's weights into one file, tensor after tensor, so that an interrupted write can go on.

A journal beside the file says how far it is safely on the disk, and of which tensors. Where both are there
and speak of the same tensors, what they hold is kept: a tensor's bytes follow from the model alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import onnx_ir as ir

JOURNAL = ".journal"
"""What a journal's name is longer by than its file's."""
STEP = 256 << 20
"""Bytes after which the file is forced to the disk and the journal says so."""


def write_data(tensors: Sequence[ir.TensorProtocol], folder: Path, name: str) -> list[ir.ExternalTensor]:
    """Write ``tensors``, one after the other, into ``folder / name``; the same tensors as they lie there.

    A tensor that is computed when it is read is computed then, and none is held. What an earlier call for the
    same tensors has left is not written again.

    Raises:
        OSError: the file cannot be written.
    """
    import onnx_ir as ir

    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += tensor.nbytes
    path, journal = folder / name, folder / f"{name}{JOURNAL}"
    plan = _plan(tensors)
    begin = _kept(path, journal, plan)
    with path.open("r+b" if begin else "wb") as stream:
        stream.truncate(begin)
        stream.seek(begin)
        _note(journal, plan, begin)
        last = begin
        for tensor, offset in zip(tensors, offsets, strict=True):
            if offset + tensor.nbytes <= begin:
                continue
            stream.seek(offset)
            _write(tensor, stream)
            stream.flush()
            done = offset + tensor.nbytes
            _check_written(stream.fileno(), done)
            if done - last >= STEP:
                os.fsync(stream.fileno())
                _note(journal, plan, done)
                last = done
        os.fsync(stream.fileno())
    _note(journal, plan, end)
    return [
        ir.ExternalTensor(
            name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=folder,
        )
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]


def kept_files(folder: Path) -> set[Path]:
    """Files below ``folder`` that an interrupted write can go on with, and their journals."""
    journals = {path for path in folder.rglob(f"*{JOURNAL}") if path.is_file()}
    return journals | {path.with_name(path.name.removesuffix(JOURNAL)) for path in journals}


def forget_journals(folder: Path) -> None:
    """Remove the journals: the files below ``folder`` are whole."""
    for path in folder.rglob(f"*{JOURNAL}"):
        path.unlink()


def _write(tensor: ir.TensorProtocol, stream: BinaryIO) -> None:
    tofile = getattr(tensor, "tofile", None)  # its protocol does not name it
    if tofile is None:
        stream.write(tensor.tobytes())
    else:
        tofile(stream)  # piece by piece, where the tensor is made of pieces


def _check_written(descriptor: int, end: int) -> None:
    """numpy's ``tofile`` may write less than it was given and say nothing.

    Raises:
        OSError: the system's own, for the first byte that is not there.
    """
    size = os.fstat(descriptor).st_size
    if size != end:
        os.pwrite(descriptor, b"\0", size)
        if os.fstat(descriptor).st_size != end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise OSError(errno.EIO, "a tensor was not written whole")


def _plan(tensors: Sequence[ir.TensorProtocol]) -> str:
    facts = [[t.name, t.dtype.name, list(t.shape.numpy()), t.nbytes] for t in tensors]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _kept(path: Path, journal: Path, plan: str) -> int:
    """Bytes of the file that are whole tensors of this plan."""
    try:
        held, count = journal.read_text(encoding="ascii").split()
        size = path.stat().st_size
        return int(count) if held == plan and 0 <= int(count) <= size else 0
    except (OSError, ValueError):
        return 0


def _note(journal: Path, plan: str, count: int) -> None:
    draft = journal.with_name(f"{journal.name}.new")
    draft.write_text(f"{plan} {count}\n", encoding="ascii")
    draft.replace(journal)
