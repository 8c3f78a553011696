"""Parity with the source model: inputs, comparison, routing, localisation, goldens.

``verify_bundle`` compares a bundle's engine with its source; ``docs/parity.md`` explains the report.
"""

from __future__ import annotations

from .result import CaseResult, Check, Finding, ParityReport
from .runner import verify_bundle
from .write import report_files, write_reports

__all__ = [
    "CaseResult",
    "Check",
    "Finding",
    "ParityReport",
    "report_files",
    "verify_bundle",
    "write_reports",
]
