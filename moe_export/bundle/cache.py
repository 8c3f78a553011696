"""Knowing that a build would make what is there already."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_export.bundle.manifest import MANIFEST_NAME, first_json_fault
from moe_export.bundle.reader import Bundle, open_bundle
from moe_export.bundle.tools import tool_versions
from moe_export.errors import BundleError, UsageError
from moe_export.files import read_json_object
from moe_export.progress import Progress
from moe_export.schema import SCHEMA_VERSION, to_json

EVIDENCE_KEY = "cache_key"
"""Where in a manifest's ``evidence`` a build records its key."""


def cache_key(source_hash: str, options: Mapping[str, Any], tools: Mapping[str, str] | None = None) -> str:
    """A stable hash (64 hexadecimal digits) of everything that decides what a build makes.

    ``options``: :meth:`BuildConfig.key_fields`; order does not matter, any JSON value or dataclass of the
    schema does. ``tools``: default :func:`tool_versions`.

    Raises:
        UsageError: an option has no JSON form.
    """
    value = to_json(
        {
            "schema": SCHEMA_VERSION,
            "source": source_hash,
            "options": dict(options),
            "tools": dict(tool_versions() if tools is None else tools),
        }
    )
    fault = first_json_fault(value, "cache key")
    if fault is not None:
        raise UsageError(fault)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def find_unchanged(
    output: str | os.PathLike[str], key: str, *, progress: Progress | None = None
) -> Bundle | None:
    """The bundle at ``output`` when it was built under ``key`` and is whole (hashes checked); else None."""
    folder = Path(output)
    evidence = (read_json_object(folder / MANIFEST_NAME) or {}).get("evidence")
    if not isinstance(evidence, dict) or evidence.get(EVIDENCE_KEY) != key:
        return None
    try:
        return open_bundle(folder, progress=progress)
    except BundleError:
        # Damaged since, so not an unchanged build: the caller builds again and meets the folder there.
        return None
