"""Adding a report to a bundle that is already in place (``verify`` and ``bench`` run later)."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from moe_export.bundle.lock import output_lock, write_error
from moe_export.bundle.manifest import (
    EVIDENCE_FOLDER,
    first_json_fault,
    read_manifest,
    replace_file,
    write_manifest,
)
from moe_export.bundle.names import shown
from moe_export.bundle.reader import Bundle
from moe_export.errors import BundleError
from moe_export.schema import FileEntry, to_json

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def save_evidence(bundle: Bundle, files: dict[str, bytes], summaries: dict[str, Any] | None = None) -> Bundle:
    """Write ``evidence/<name>`` for each of ``files`` and put ``summaries`` into the manifest's ``evidence``.

    Both replace what is there under the same name. A crash at any moment leaves a bundle that opens: the
    manifest first stops listing the files, then they are written, then it lists them again with their hashes.

    Returns: the bundle with its new manifest.

    Raises:
        BundleError: a name is not a plain file name, or a summary has no JSON form.
        UsageError, EnvironmentLacksError: another process writes there, or the file system refuses.
    """
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise BundleError(f"evidence file name {shown(name)}: expected letters, digits, '.', '_' and '-'")
    fault = first_json_fault(to_json(summaries or {}), "evidence")
    if fault is not None:
        raise BundleError(fault)
    root = bundle.path.resolve()
    paths = {f"{EVIDENCE_FOLDER}/{name}": content for name, content in files.items()}
    with output_lock(root):
        manifest = read_manifest(root)
        kept = tuple(entry for entry in manifest.files if entry.path not in paths)
        new = tuple(
            FileEntry(path, len(content), hashlib.sha256(content).hexdigest())
            for path, content in paths.items()
        )
        final = dataclasses.replace(
            manifest,
            files=tuple(sorted((*kept, *new), key=lambda entry: entry.path)),
            evidence={**manifest.evidence, **(summaries or {})},
        )
        try:
            if kept != manifest.files:
                write_manifest(root, dataclasses.replace(manifest, files=kept))
            folder = root / EVIDENCE_FOLDER
            if folder.is_symlink():
                raise BundleError(f"{folder} is a link; remove it")
            folder.mkdir(exist_ok=True)
            for path, content in paths.items():
                replace_file(root / Path(path), content)
            write_manifest(root, final)
        except OSError as error:
            raise write_error(error, root / EVIDENCE_FOLDER) from error
    return dataclasses.replace(bundle, manifest=final)
