"""What reports call a bundle."""

from __future__ import annotations

import re
from pathlib import Path

_UNFINISHED = re.compile(r"\.(.+)\.partial-\d+-[0-9a-f]{8}")


def bundle_label(path: Path) -> str:
    """The name of a bundle's folder; of one that is still being written, the name it will have."""
    name = path.resolve().name
    match = _UNFINISHED.fullmatch(name)
    return match[1] if match else name
