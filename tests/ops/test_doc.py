"""docs/ops.md is what the contracts say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moe_export.ops import OPS
from tests.helpers.tools import check_stale_page_is_found, tool

generator = tool("generate_ops_doc")


def test_page_is_fresh() -> None:
    written = generator.PAGE.read_text(encoding="utf-8")
    assert written == generator.page(), "run python tools/generate_ops_doc.py"


def test_every_name_and_tolerance_is_in_its_ops_section() -> None:
    sections = dict(part.split("`", 1) for part in generator.page().split("\n## `")[1:])
    assert list(sections) == list(OPS)
    for op in OPS.values():
        for named in (*op.inputs, *op.outputs, *op.attributes):
            assert f"| `{named.name}`" in sections[op.name]
        for dtype, tolerance in op.tolerance.items():
            assert f"| {dtype} | {tolerance.max:g} | {tolerance.rms:g} |" in sections[op.name]


def test_another_contract_gives_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    before = generator.page()
    changed = dataclasses.replace(OPS["Combine"], summary="Something else | and a bar")
    monkeypatch.setitem(generator.OPS, "Combine", changed)
    assert generator.page() != before
    assert "Something else \\| and a bar." in generator.page()


def test_check_finds_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_stale_page_is_found(generator, tmp_path, monkeypatch, capsys)
