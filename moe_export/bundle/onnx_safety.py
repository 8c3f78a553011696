"""Refusing a hostile ONNX file before any loader follows it.
 An ONNX model names files (external data) and things (tensors, nodes). Loaders open the former and turn the
latter into file names, log lines and reports. Everything here is read from the model's protobuf alone,
without loading a weight.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moe_export.bundle.names import name_fault, path_fault, shown
from moe_export.errors import BundleError

_MAX_PROTO = (1 << 31) - 1
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
_BITS = {
    **dict.fromkeys(("UINT2", "INT2"), 2),
    **dict.fromkeys(("UINT4", "INT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("FLOAT6E2M3", "FLOAT6E3M2"), 6),
    **dict.fromkeys(("UINT8", "INT8", "BOOL"), 8),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("UINT16", "INT16", "FLOAT16", "BFLOAT16"), 16),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    "COMPLEX128": 128,
}
_FREE_TEXT = frozenset({"doc_string", "value"})
"""Fields that hold prose, not names: documentation, and the values of metadata (stack traces, for
example)."""


def check_onnx_safe(
    model_path: str | os.PathLike[str], *, root: Path | None = None, allowed: frozenset[str] | None = None
) -> None:
    """Refuse an ONNX model that reaches outside its folder or plays tricks with names.

    Checked everywhere in the model (graphs, subgraphs of ``If``/``Loop``/``Scan``, functions, sparse
    initializers, attributes of any node, training graphs): external data lies in a plain file below ``root``
    (default: the model's folder), within that file's bounds and of the tensor's size; names have no control
    characters, backslashes or ``..`` parts; no initializer name is given twice in one graph; no node loads
    another file by itself.

    ``allowed``: paths relative to ``root`` (a bundle's listed files); external data elsewhere is refused.

    Raises:
        BundleError: the first fault found, or the file is not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(model_path)
    try:
        if path.stat().st_size > _MAX_PROTO:
            raise BundleError(f"{path} is larger than 2 GiB, which no ONNX file can be; weights go beside it")
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise BundleError(f"{path} is not a valid ONNX file: {error}") from error
    if not model.HasField("graph"):
        raise BundleError(f"{path} is not a valid ONNX file: it has no graph")
    types = {number: name for name, number in onnx.TensorProto.DataType.items()}
    checker = _Checker(path, root or path.parent, allowed, types)
    for place in _places(model):
        checker.check(place)


@dataclass(slots=True)
class _Place:
    """Where a message is in the model. Put into words only for an error: models have many messages."""

    parent: _Place | None
    field: str
    index: int
    message: Any

    def __str__(self) -> str:
        if self.parent is None:
            return "model"
        name = getattr(self.message, "name", "")
        label = name if isinstance(name, str) and name else str(self.index)
        return f"{self.parent} > {self.field} {shown(label, 60)}"


def _places(model: Any) -> Iterator[_Place]:
    """Every protobuf message inside the model, by its schema, so that nothing is left out."""
    stack = [_Place(None, "", 0, model)]
    while stack:
        place = stack.pop()
        yield place
        for field, value in place.message.ListFields():
            if field.message_type is None:
                continue
            # A list of messages is told from one message by what it offers: protobuf has renamed the flag.
            for i, item in enumerate([value] if hasattr(value, "ListFields") else value):
                stack.append(_Place(place, field.name, i, item))


class _Checker:
    def __init__(self, path: Path, root: Path, allowed: frozenset[str] | None, types: dict[int, str]) -> None:
        self._types = types
        self._path = path
        self._root = root.resolve()
        self._folder = path.parent.resolve()
        self._allowed = allowed
        self._sizes: dict[str, int] = {}

    def check(self, where: _Place) -> None:
        """Check one message by its type; its children are visited apart."""
        message = where.message
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto":
            self._check_tensor(message, where)
        elif kind == "GraphProto":
            self._check_initializers(message, where)
        elif kind == "NodeProto":
            self._check_node(message, where)
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING and field.name not in _FREE_TEXT:
                for item in [value] if isinstance(value, (str, bytes)) else value:
                    text = self._text(item, where)
                    fault = name_fault(text)
                    if fault is not None:
                        raise self._error(where, f"{field.name} {shown(text)} {fault}")

    def _check_initializers(self, graph: Any, where: _Place) -> None:
        seen: set[str] = set()
        names = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
        for name in names:
            if not name:
                raise self._error(where, "an initializer has no name")
            if name in seen:
                raise self._error(where, f"initializer {shown(name)} is defined twice")
            seen.add(name)

    def _check_node(self, node: Any, where: _Place) -> None:
        if node.op_type == "EPContext":
            raise self._error(where, "an EPContext node makes the runtime load another file")

    def _check_tensor(self, tensor: Any, where: _Place) -> None:
        if any(dim < 0 for dim in tensor.dims):
            raise self._error(where, f"dimensions {list(tensor.dims)} are negative")
        external = tensor.data_location == tensor.EXTERNAL
        if not external and not tensor.external_data:
            return
        entries: dict[str, str] = {}
        for entry in tensor.external_data:
            key = self._text(entry.key, where)
            if key in entries:
                raise self._error(where, f"external data gives {shown(key)} twice")
            if key not in _EXTERNAL_KEYS:
                raise self._error(where, f"external data has the unknown key {shown(key)}")
            entries[key] = self._text(entry.value, where)
        location = entries.get("location", "")
        size = self._file_size(location, where)
        offset = self._number("offset", entries.get("offset", "0"), where)
        needs = self._tensor_bytes(tensor, where)
        length = self._number("length", entries["length"], where) if "length" in entries else needs
        if length != needs:
            raise self._error(where, f"external data has length {length}, the tensor needs {needs} bytes")
        if offset + length > size:
            raise self._error(
                where,
                f"external data ends at byte {offset + length} of {shown(location)}, which has {size} bytes",
            )

    def _file_size(self, location: str, where: _Place) -> int:
        if location in self._sizes:
            return self._sizes[location]
        what = f"external data location {shown(location)}"
        fault = path_fault(location)
        if fault is not None:
            raise self._error(where, f"{what} {fault}; it must be a file beside the model")
        target = self._folder / PurePosixPath(location)
        try:
            resolved = target.resolve()
            if not resolved.is_relative_to(self._root):
                raise self._error(where, f"{what} is a link that leaves the folder")
            info = resolved.stat()
        except FileNotFoundError as error:
            raise self._error(where, f"{what} does not exist") from error
        except (OSError, RuntimeError) as error:
            raise self._error(where, f"{what} cannot be read ({error})") from error
        if not stat.S_ISREG(info.st_mode):
            raise self._error(where, f"{what} is not a file")
        if self._allowed is not None:
            relative = Path(os.path.relpath(target, self._root)).as_posix()
            if relative not in self._allowed:
                raise self._error(where, f"{what} is not among the bundle's listed files")
        self._sizes[location] = info.st_size
        return info.st_size

    def _text(self, text: str | bytes, where: _Place) -> str:
        """protobuf hands over a text that is not UTF-8 as bytes."""
        if isinstance(text, bytes):
            raise self._error(where, "a name is not UTF-8")
        return text

    def _number(self, key: str, text: str, where: _Place) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 19):
            raise self._error(where, f"external data {key} {shown(text)} is not a number of 0 or more")
        return int(text)

    def _tensor_bytes(self, tensor: Any, where: _Place) -> int:
        name = self._types.get(tensor.data_type, str(tensor.data_type))
        if name not in _BITS:
            raise self._error(where, f"a tensor of type {name} cannot have external data")
        return (math.prod(tensor.dims) * _BITS[name] + 7) // 8

    def _error(self, where: _Place, fault: str) -> BundleError:
        return BundleError(f"{self._path}: {where}: {fault}; the model is not loaded")
