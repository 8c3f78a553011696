"""The formats there are."""

from __future__ import annotations

from moe_export.errors import UsageError, choices_text
from moe_export.package.base import PackageFormat
from moe_export.package.triton import TritonFormat

FORMATS: dict[str, PackageFormat] = {kind.name: kind for kind in (TritonFormat(),)}


def get_format(name: str) -> PackageFormat:
    """The format ``name``.

    Raises:
        UsageError: there is none; the message lists all.
    """
    if name not in FORMATS:
        raise UsageError(f"format: unknown value {name!r}; {choices_text(str(name), FORMATS)}")
    return FORMATS[name]
