"""What the generators of ``docs/`` have in common: one command that writes a page or checks it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_or_check(page: Path, text: Callable[[], str], generator: str) -> int:
    """Write ``text()`` to ``page``; with ``--check`` write nothing, and return 1 when the page differs.

    ``generator``: path of the calling script; help and advice name it.
    """
    script = f"tools/{Path(generator).name}"
    parser = argparse.ArgumentParser(prog=script, description=f"Writes docs/{page.name}.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 when the page is stale"
    )
    check = parser.parse_args().check
    made = text()
    if not check:
        page.write_text(made, encoding="utf-8")
    elif not page.is_file() or page.read_text(encoding="utf-8") != made:
        print(f"{page.name} is stale: run python {script}", file=sys.stderr)
        return 1
    return 0
