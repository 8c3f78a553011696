"""Small file helpers that every part may use: hashing, sizes as text, and saying what a path is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
_FILE_KINDS = {
    ".onnx": "an ONNX file",
    ".safetensors": "a safetensors file",
    ".gguf": "a GGUF file",
    ".bin": "a PyTorch pickle file",
    ".pt": "a PyTorch pickle file",
    ".pth": "a PyTorch pickle file",
    ".npz": "a NumPy .npz file",
    ".json": "a JSON file",
    ".zip": "an archive, not unpacked",
    ".gz": "an archive, not unpacked",
    ".tar": "an archive, not unpacked",
}


def sha256_file(path: str | os.PathLike[str], advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hex, read in blocks. ``advance`` is called with the bytes read since the last
    call.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        update_hash(digest, stream, advance)
    return digest.hexdigest()


def update_hash(digest: Any, stream: Any, advance: Callable[[int], None] | None = None) -> None:
    """Feed the rest of a binary ``stream`` to a ``hashlib`` object."""
    buffer = memoryview(bytearray(_BLOCK))
    while count := stream.readinto(buffer):
        digest.update(buffer[:count])
        if advance is not None:
            advance(count)


def bytes_text(count: int) -> str:
    """A number of bytes for people: ``512 B``, ``3.2 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a small file, or None when there is none (no file, not JSON, not an object)."""
    try:
        if not path.is_file() or path.stat().st_size > 64 << 20:
            return None
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def describe_path(path: Path) -> str:
    """What a path is, as the end of a sentence that starts with the path: ``is an empty folder``."""
    try:
        if path.is_dir():
            return f"is {_describe_folder(path)}"
        if path.is_file():
            return f"is {_FILE_KINDS.get(path.suffix.lower(), 'a file')}"
        return "is neither a file nor a folder" if path.exists() else "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _describe_folder(folder: Path) -> str:
    entries = sorted(entry.name for entry in folder.iterdir())
    if "schema_version" in (read_json_object(folder / "manifest.json") or {}):
        return "a moe-export bundle"
    config = read_json_object(folder / "config.json")
    if config is not None and "model_type" in config:
        return f"a Hugging Face model folder (model_type {config['model_type']!r})"
    if "adapter_config.json" in entries:
        return "a PEFT adapter (merge it into its base model with merge_and_unload first)"
    if "model_index.json" in entries:
        return "a diffusers pipeline folder"
    for suffix, what in (
        (".onnx", "ONNX files"),
        (".gguf", "GGUF files"),
        (".safetensors", "safetensors files"),
    ):
        found = [name for name in entries if name.endswith(suffix)]
        if found:
            return f"a folder with {what} ({_some(found)})"
    inner = [name for name in entries if (folder / name / "config.json").is_file()]
    snapshots = sorted((folder / "snapshots").glob("*/config.json"))
    if snapshots:
        inner.append(f"snapshots/{snapshots[-1].parent.name}")
    if inner:
        return f"a folder that holds model folders; name one of them: {_some(inner)}"
    return f"a folder with {_some(entries)}" if entries else "an empty folder"


def _some(names: list[str], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def runs_code(source: str) -> bool:
    """Whether a source is ``file.py:function``: loading it runs code of the user's."""
    file, colon, _ = source.rpartition(":")
    return bool(colon) and file.endswith(".py")
