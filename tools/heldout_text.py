"""Text to train and to test the example on: the source of Python's own standard library, read at run time.

Nothing of that text is stored in this repository. Whether a file is for training or held out depends only on
the name of its top-level module or package, so ``asyncio`` is on one side as a whole, ``_pydecimal.py`` goes
where ``decimal.py`` goes, and the answer is the same in every version of Python.

``python tools/heldout_text.py --chars 20000 -o FILE`` writes a held-out text for ``moe-export trace`` and co.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import click

from moe_export.errors import EnvironmentLacksError, UsageError

Split = Literal["training", "held-out"]

HELD_OUT_ONE_IN = 14
"""One top-level name in this many is held out, by hash."""

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "_pyrepl", "dist-packages", "distutils", "encodings", "ensurepip", "idle_test",
        "idlelib", "lib-dynload", "lib2to3", "msilib", "pydoc_data", "site-packages", "test", "tests",
        "turtledemo",
    }
)  # fmt: skip
"""Tests, tables, bundled or removed packages, and packages that a distribution may leave out."""

MACHINE_SPECIFIC = ("_sysconfigdata", "sitecustomize", "usercustomize")
"""Beginnings of the names of files that say something about one machine."""


def top_level_name(path: str) -> str:
    """The module or package of a path relative to the standard library, without leading ``_py`` or ``_``.

    >>> top_level_name("asyncio/events.py"), top_level_name("_pydecimal.py"), top_level_name("_strptime.py")
    ('asyncio', 'decimal', 'strptime')
    """
    return path.split("/", 1)[0].removesuffix(".py").removeprefix("_py").lstrip("_")


def split_of(path: str) -> Split:
    """Which side a file is on; ``path`` is relative to the standard library, with forward slashes."""
    digest = hashlib.sha256(top_level_name(path).encode()).digest()
    return "held-out" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "training"


@cache
def _read(root: str, split: Split) -> tuple[tuple[str, str], ...]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in SKIPPED_FOLDERS and not s.startswith("config-")]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if not file.endswith(".py") or file.startswith(MACHINE_SPECIFIC) or split_of(name) != split:
                continue
            with suppress(UnicodeDecodeError):
                found.append((name, path.read_text(encoding="utf-8")))
    return tuple(sorted((name, text) for name, text in found if text.strip()))


def stdlib_sources(split: Split) -> dict[str, str]:
    """Relative path → source text of every file of ``split``, in path order.

    Files that are not valid UTF-8 are left out.

    Raises:
        EnvironmentLacksError: this Python has no readable sources (a frozen or zipped standard library).
    """
    root = sysconfig.get_path("stdlib")
    found = _read(root, split)
    if not found:
        raise EnvironmentLacksError(
            f"no {split} source files of the standard library under {root}; "
            "use a Python that is installed with its .py files"
        )
    return dict(found)


def heldout_text(n_chars: int, seed: int = 0) -> str:
    """``n_chars`` characters of held-out Python source.

    The held-out files are put in an order drawn from ``seed`` and read from a line drawn from ``seed``,
    wrapping round at the end. The same seed, length and version of Python give the same text; a longer text
    starts with the shorter one.

    Raises:
        UsageError: ``n_chars`` is below 1 or more than there is.
    """
    texts = list(stdlib_sources("held-out").values())
    rng = random.Random(seed)
    rng.shuffle(texts)
    whole = "\n".join(texts)
    if not 1 <= n_chars <= len(whole):
        raise UsageError(f"n_chars is {n_chars}; expected 1 to {len(whole)}, all that this Python has")
    start = whole.find("\n", rng.randrange(len(whole))) + 1
    return (whole[start:] + whole[:start])[:n_chars]


@click.command()
@click.option("--chars", default=20_000, show_default=True, help="Length in characters.")
@click.option("--seed", default=0, show_default=True, help="Chooses the files' order and the place to start.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File; standard output without it.")
def main(chars: int, seed: int, output: Path | None) -> None:
    """Write text from Python's standard library that the example model was not trained on."""
    try:
        text = heldout_text(chars, seed)
    except (UsageError, EnvironmentLacksError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
