"""Which names and paths a bundle may contain. Used for files of a manifest and for names inside an ONNX
model."""

from __future__ import annotations

import re
import unicodedata

MAX_NAME = 4096
_DRIVE = re.compile(r"^[A-Za-z]:")
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def name_fault(name: str) -> str | None:
    """Why ``name`` must not name a tensor or a node, or None.

    Slashes are ordinary in ONNX names; tools that turn names into file names must not be led elsewhere, so
    ``..`` as a part, backslashes, and characters that a terminal acts on or does not show are refused.
    """
    if len(name) > MAX_NAME:
        return f"is {len(name)} characters long (at most {MAX_NAME})"
    if name.isascii() and name.isprintable():
        if "\\" in name:
            return "contains a backslash"
        return "contains '..' as a path part" if ".." in name and ".." in name.split("/") else None
    for character in name:
        if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            return f"contains the control character U+{ord(character):04X}"
    if "\\" in name:
        return "contains a backslash"
    return "contains '..' as a path part" if ".." in name.split("/") else None


def path_fault(path: str) -> str | None:
    """Why ``path`` must not be a file of a bundle (relative, forward slashes, in normal form), or None."""
    if not path:
        return "is empty"
    if path.startswith("/") or _DRIVE.match(path):
        return "is absolute"
    fault = name_fault(path)
    if fault is not None:
        return fault
    if any(part in ("", ".") for part in path.split("/")):
        return "is not in normal form"
    return None


def shown(name: str, limit: int = 80) -> str:
    """``name`` for an error message: quoted, control characters escaped, cut when long."""
    return ascii(name if len(name) <= limit else name[: limit - 3] + "...")
