"""Places for the weights of an ONNX model: links to a checkpoint's own files, one file for the rest."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SourceError
from ..files import bytes_text
from .data_file import write_data

if TYPE_CHECKING:
    import onnx_ir as ir

CHECKPOINT_FOLDER = "checkpoint"
"""Folder of a bundle that holds the checkpoint's files. Runtimes refuse paths and links that leave a model's
folder, so the files are there under a second name (hard links), not by reference to another place."""
_INLINE_BYTES = 256
"""Smaller tensors stay in the model file."""
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES})


@dataclass(frozen=True)
class WeightFiles:
    """Where a model's weights went, in bytes of tensors.

    ``referenced``: they lie in the checkpoint's own files. ``written``: in a file of ours. ``copied``: of the
    checkpoint's files, those bytes that had to be copied, and ``why``.
    """

    referenced: int
    written: int
    copied: int = 0
    why: str = ""

    def text(self) -> str:
        """One line for the report."""
        text = f"{bytes_text(self.referenced)} referenced in the checkpoint's own files, "
        text += f"{bytes_text(self.written)} written"
        return f"{text}; {bytes_text(self.copied)} of its files copied: {self.why}" if self.copied else text


def place_weights(model: ir.Model, folder: Path, data_file: str) -> WeightFiles:
    """Give every initializer of ``model`` a place in ``folder``: tensors of a checkpoint in links to its
    files below ``checkpoint/``, other large ones in ``data_file``.

    Raises:
        SourceError: a file of the checkpoint cannot be linked or copied.
    """
    import onnx_ir as ir

    values = [v for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]
    referenced = [v for v in values if _foreign(v.const_value, folder)]
    rest = [v for v in values if not _foreign(v.const_value, folder) and _large(v.const_value)]
    places, copied, why = _take_over(referenced, folder)
    for value in referenced:
        old = value.const_value
        assert isinstance(old, ir.ExternalTensor) and value.name is not None
        value.const_value = ir.ExternalTensor(
            places[_path(old)],
            old.offset,
            old.length,
            old.dtype,
            shape=old.shape,
            name=value.name,
            base_dir=folder,
        )
    tensors = [v.const_value for v in rest if v.const_value is not None]
    made = write_data(tensors, folder, data_file) if tensors else []
    for value, tensor in zip(rest, made, strict=True):
        value.const_value = tensor
    return WeightFiles(
        sum(v.const_value.nbytes for v in referenced if v.const_value is not None),
        sum(t.nbytes for t in tensors),
        copied,
        why,
    )


def _foreign(tensor: object, folder: Path) -> bool:
    import onnx_ir as ir

    return isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) != folder


def _large(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.nbytes > _INLINE_BYTES


def _path(tensor: ir.ExternalTensor) -> Path:
    return Path(tensor.base_dir) / tensor.location


def _take_over(values: list[ir.Value], folder: Path) -> tuple[Mapping[Path, str], int, str]:
    """Link, or else copy, each file once; path → its name in the bundle, bytes copied, and why."""
    import onnx_ir as ir

    places: dict[Path, str] = {}
    copied, why = 0, ""
    for value in values:
        assert isinstance(value.const_value, ir.ExternalTensor)
        source = _path(value.const_value)
        if source in places:
            continue
        (folder / CHECKPOINT_FOLDER).mkdir(exist_ok=True)
        target = folder / CHECKPOINT_FOLDER / source.name
        real = source.resolve()  # hub caches hold links to their files
        try:
            os.link(real, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise SourceError(f"{source} cannot be linked into the bundle: {error.strerror}") from error
            why = f"no hard link from {folder.parent} to {source.parent} ({error.strerror})"
            copied += shutil.copyfile(real, target).stat().st_size
        places[source] = f"{CHECKPOINT_FOLDER}/{source.name}"
    return places, copied, why
