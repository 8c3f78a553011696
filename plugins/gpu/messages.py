"""Messages between a process and its worker: a line of JSON, then arrays as plain bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import IO, Any


def write_message(stream: IO[bytes], head: Mapping[str, Any], data: Sequence[bytes]) -> None:
    """Send ``head`` (JSON values) and ``data``."""
    line = json.dumps({"head": head, "sizes": [len(d) for d in data]})
    stream.write(line.encode() + b"\n")
    for piece in data:
        stream.write(piece)
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next message; None when the other side has closed or ended in the middle of one."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    parsed = json.loads(line)
    data = [stream.read(size) for size in parsed["sizes"]]
    if [len(d) for d in data] != parsed["sizes"]:
        return None
    return parsed["head"], data
