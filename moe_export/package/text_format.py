"""A small writer of protobuf's text format: enough for a server's model configuration.

A message is a list of ``(field, value)`` in order; a field that stands several times is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Enum:
    """A value of an enumeration, written without quotes."""

    name: str


Message: TypeAlias = list[tuple[str, Any]]
"""Values: texts, whole numbers, bools, :class:`Enum`, tuples of whole numbers, and messages."""


def to_text(message: Message, indent: int = 0) -> str:
    """``message`` as text, a field per line."""
    space = "  " * indent
    lines = []
    for name, value in message:
        if isinstance(value, list):
            inner = to_text(value, indent + 1)
            lines.append(f"{space}{name} {{\n{inner}{space}}}\n")
        else:
            lines.append(f"{space}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        return quoted(value)
    return f"[ {', '.join(str(item) for item in value)} ]"


def quoted(text: str) -> str:
    """``text`` as a string of the text format: printable ASCII as it is, all else as octal bytes."""
    marks = {ord('"'): '\\"', ord("\\"): "\\\\"}
    parts = [
        marks.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in text.encode()
    ]
    return f'"{"".join(parts)}"'
