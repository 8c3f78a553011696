"""Speed of an engine against other ways to run the same model: interleaved, in equal conditions, numbers
checked."""

from __future__ import annotations

from .contestants import BASELINES
from .machine import Machine
from .result import BenchReport, Contestant, Ratio, Row, Sanity, Skipped
from .routing import ROUTINGS
from .run import bench_bundle
from .table import format_table

__all__ = [
    "BASELINES",
    "ROUTINGS",
    "BenchReport",
    "Contestant",
    "Machine",
    "Ratio",
    "Row",
    "Sanity",
    "Skipped",
    "bench_bundle",
    "format_table",
]
