"""docs/expert-parallel-predicted.md is what the cost model says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_export.inspect.config_summary import describe
from tests.helpers.tools import check_stale_page_is_found, tool

generator = tool("generate_expert_parallel_doc")


def test_page_is_fresh() -> None:
    written = generator.PAGE.read_text(encoding="utf-8")
    assert written == generator.page(), "run python tools/generate_expert_parallel_doc.py"


def test_page_says_predicted_at_every_table_and_has_what_was_asked() -> None:
    page = generator.page()
    tables = page.count("| exchange | load |")
    assert len(re.findall(r"predicted:\n\n\| exchange", page)) == tables == 9
    assert "Nothing of it was run on a GPU" in page
    for title, gpus in (("Mixtral 8x22B", 8), ("DeepSeek-V3", 32)):
        assert f"{gpus} x H100" in page and f"## {title}" in page


def test_rows_are_consistent() -> None:
    """Full blocks send at least what fitting ones do, replicas take memory, and times hold their parts."""
    case = generator.CASES[1]
    found = list(generator.rows(case, describe(case.preset), "prefill", case.gpus))
    assert len(found) == 12
    by = {(r.way.exchange, r.way.load, r.way.placement): r for r in found}
    for (exchange, load, placement), row in by.items():
        assert row.result is not None
        assert row.result.time.exchange + row.result.waiting < row.result.time.seconds
        if exchange == generator.FIT:
            full = by[generator.FULL, load, placement]
            assert full.result is not None and row.result.exchange_bytes < full.result.exchange_bytes
        if placement.endswith("replicas"):
            assert row.memory > by[exchange, load, "balanced"].memory
            assert row.result.waiting < by[exchange, load, "in order"].result.waiting


def test_check_finds_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_stale_page_is_found(generator, tmp_path, monkeypatch, capsys)
