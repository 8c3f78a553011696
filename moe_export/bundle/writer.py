"""Writing a bundle: into a temporary sibling, renamed into place when complete."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Self

from moe_export.bundle.folder_writer import KEY_FILE, FolderWriter, says_no_space
from moe_export.bundle.hashing import FolderHashes
from moe_export.bundle.lock import write_error
from moe_export.bundle.manifest import MANIFEST_NAME, manifest_fault, write_manifest
from moe_export.bundle.reader import Bundle
from moe_export.bundle.tools import tool_versions
from moe_export.errors import BundleError
from moe_export.schema import Manifest


class BundleWriter(FolderWriter):
    """Makes the bundle ``output``, whole or not at all.

    ``with BundleWriter(output) as writer:`` gives ``writer.path``, a temporary sibling to fill;
    ``writer.commit(manifest)`` hashes what is there, writes ``manifest.json`` and renames it to ``output``.
    All else is as :class:`FolderWriter` says.
    """

    what = "bundle"
    plural = "bundles"
    marker = MANIFEST_NAME
    marker_key = "schema_version"

    def __enter__(self) -> Self:
        super().__enter__()
        self._hashes = FolderHashes(self.path)
        return self

    def know(self, relative: str, size: int, sha256: str) -> None:
        """The SHA-256 of a file in :attr:`path` that the caller has read already."""
        self._hashes.know(relative, size, sha256)

    def commit(self, manifest: Manifest) -> Path:
        """Finish the bundle; returns the output folder.

        Fills ``files`` (every file but the manifest), ``tools`` (what ``manifest`` gives wins) and
        ``created``.

        Raises:
            BundleError: the manifest does not fit the files, or a file must not be in a bundle.
            UsageError, EnvironmentLacksError: the file system refuses.
        """
        self.stage(manifest)
        return self.place()

    def stage(self, manifest: Manifest) -> Bundle:
        """Make what lies in :attr:`path` a bundle that can be opened there, so that it can be verified before
        :meth:`commit` gives it its name. May be called again after files changed.

        Raises:
            BundleError: the manifest does not fit the files, or a file must not be in a bundle.
            UsageError, EnvironmentLacksError: the file system refuses.
        """
        temporary = self.path
        (temporary / KEY_FILE).unlink(missing_ok=True)
        complete = dataclasses.replace(
            manifest,
            files=self._hashes.entries(self._progress),
            tools={**tool_versions(), **manifest.tools},
            created=manifest.created or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        fault = manifest_fault(complete)
        if fault is not None:
            raise BundleError(f"the bundle is not complete: {fault}")
        try:
            write_manifest(temporary, complete)
        except OSError as error:
            if says_no_space(error):
                raise
            raise write_error(error, self._output) from error
        return Bundle(temporary, complete)
