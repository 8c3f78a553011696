"""What the command lines of the benchmarks share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def numbers(text: str) -> list[int]:
    """``1,8,64``: whole numbers of 1 or more."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected whole numbers of 1 or more, with commas between"
        )
    return values


def number(text: str) -> int:
    """A whole number of 1 or more."""
    values = numbers(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one number")
    return values[0]


def several(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """``A,B``: some of ``choices``."""
    known = tuple(choices)

    def split(text: str) -> list[str]:
        values = text.split(",")
        for value in values:
            if value not in known:
                raise argparse.ArgumentTypeError(f"{value!r}: expected some of {', '.join(known)}")
        return values

    return split


def existing_folder(text: str) -> Path:
    """A folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a folder that exists")
    return Path(text)


def new_file(text: str) -> Path:
    """A file to be written after the measurement: refused before it where its folder is missing."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a folder that exists")
    return path


def write_rows(rows: Sequence[Any], path: Path | None) -> None:
    """Dataclasses as a JSON list; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
