"""``manifest.json`` on disk: written atomically, read with every field checked."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_export.bundle.names import path_fault, shown
from moe_export.errors import BundleError, choices_text
from moe_export.schema import DTYPES, SCHEMA_VERSION, TASKS, Manifest, from_json, to_json

MANIFEST_NAME = "manifest.json"
EVIDENCE_FOLDER = "evidence"
MAX_MANIFEST_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` so that a crash leaves the old or the new one.

    Raises:
        BundleError: a value has no JSON form (NaN, infinity, an array); the message names the field.
        OSError: the file system refuses.
    """
    value = to_json(manifest)
    fault = first_json_fault(value, "manifest")
    if fault is not None:
        raise BundleError(fault)
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    replace_file(folder / MANIFEST_NAME, text.encode("ascii"))


def replace_file(path: Path, content: bytes) -> None:
    """Give ``path`` the ``content`` atomically: a sibling is written, synced to disk and renamed."""
    sibling = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with sibling.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        sibling.replace(path)
    finally:
        sibling.unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` of a bundle folder. The files it lists are not looked at.

    Raises:
        BundleError: unreadable, not JSON, of another schema version, or a field is wrong; the message names
        it.
    """
    path = folder / MANIFEST_NAME
    try:
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is {size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
        data = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is not valid JSON ({error}); the bundle is damaged, build or copy it again"
        ) from error
    if not isinstance(data, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(data).__name__}")
    version = data.get("schema_version")
    if type(version) is not int:
        raise BundleError(f"{path}: field 'schema_version' is missing or not a whole number")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path}: the bundle has schema version {version}, this moe-export reads up to {SCHEMA_VERSION}; "
            "upgrade it with `pip install --upgrade moe-export`"
        )
    if version < 1:
        raise BundleError(f"{path}: schema version {version} does not exist")
    try:
        manifest: Manifest = from_json(Manifest, data, "manifest")
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: {error}") from error
    fault = manifest_fault(manifest)
    if fault is not None:
        raise BundleError(f"{path}: {fault}")
    return manifest


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def manifest_fault(manifest: Manifest) -> str | None:
    """The first thing wrong with a manifest whose types are right, or None."""
    return next(_manifest_faults(manifest), None)


def _manifest_faults(manifest: Manifest) -> Iterator[str]:
    if manifest.dtype not in DTYPES:
        yield f"dtype {shown(manifest.dtype)} is unknown; {choices_text(manifest.dtype, DTYPES)}"
    if manifest.task not in TASKS:
        yield f"task {shown(manifest.task)} is unknown; {choices_text(manifest.task, TASKS)}"
    paths: set[str] = set()
    for i, entry in enumerate(manifest.files):
        fault = path_fault(entry.path)
        if fault is not None:
            yield f"files[{i}].path {shown(entry.path)} {fault}; files of a bundle lie inside its folder"
        if entry.path == MANIFEST_NAME:
            yield f"files[{i}].path names the manifest itself"
        if entry.path in paths:
            yield f"files[{i}].path {shown(entry.path)} is listed twice"
        paths.add(entry.path)
        if entry.size < 0:
            yield f"files[{i}].size is {entry.size}"
        if not _SHA256.fullmatch(entry.sha256):
            yield f"files[{i}].sha256 is not 64 lowercase hexadecimal digits"
        if entry.block and not 1 << 20 <= entry.block <= 1 << 40:
            yield f"files[{i}].block is {entry.block}; expected 0, or at least 1 MiB"
    if manifest.model_file not in paths:
        yield f"model_file {shown(manifest.model_file)} is not among the listed files"
    tokenizer = manifest.text.tokenizer if manifest.text else None
    if tokenizer is not None and not any(path.startswith(f"{tokenizer}/") for path in paths):
        yield f"text.tokenizer {shown(tokenizer)}: no listed file lies in that folder"
    for name, specs in (("inputs", manifest.io.inputs), ("outputs", manifest.io.outputs)):
        names = [spec.name for spec in specs]
        for i, spec in enumerate(specs):
            if names.index(spec.name) != i:
                yield f"io.{name}[{i}].name {shown(spec.name)} is listed twice"
            if any(type(dim) is int and dim < 0 for dim in spec.shape):
                yield f"io.{name}[{i}].shape {spec.shape} has a negative dimension"
    for limit in ("max_batch", "max_sequence"):
        value = getattr(manifest.limits, limit)
        if value is not None and value < 1:
            yield f"limits.{limit} is {value}"


def first_json_fault(value: Any, where: str) -> str | None:
    """Which part of a value of dicts and lists JSON cannot hold (NaN, infinity, an array), or None."""
    return next(
        (f"{place} {fault}, which JSON cannot hold" for place, fault in _json_faults(value, where)), None
    )


def _json_faults(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _json_faults(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _json_faults(item, f"{where}[{i}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield where, f"is {value}"
    elif value is not None and not isinstance(value, (str, int, bool)):
        yield where, f"is a {type(value).__module__}.{type(value).__qualname__}"
