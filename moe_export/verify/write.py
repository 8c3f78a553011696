"""A parity report as files: JSON for programs, JUnit XML for CI, Markdown for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import UsageError
from .result import ParityReport


def report_files(report: ParityReport) -> dict[str, bytes]:
    """``parity.json``, ``parity.junit.xml`` and ``parity.md`` by name."""
    from ..report.junit import parity_junit
    from ..report.markdown import parity_markdown

    text = json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    return {
        "parity.json": text.encode(),
        "parity.junit.xml": parity_junit(report),
        "parity.md": parity_markdown(report).encode(),
    }


def write_reports(report: ParityReport, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write the three files into ``folder`` (created when missing); returns their paths by name.

    Raises:
        UsageError: the folder cannot be written.
    """
    folder = Path(folder)
    paths = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in report_files(report).items():
            paths[name] = folder / name
            paths[name].write_bytes(content)
    except OSError as error:
        raise UsageError(f"parity report cannot be written to {folder}: {error.strerror or error}") from error
    return paths
