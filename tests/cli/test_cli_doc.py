"""docs/cli.md is what the commands say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tools import check_stale_page_is_found, tool

generator = tool("generate_cli_doc")


def test_page_is_fresh() -> None:
    fresh = generator.page()
    written = generator.PAGE.read_text(encoding="utf-8")
    assert written == fresh, "run python tools/generate_cli_doc.py"


def test_page_has_every_command_and_option() -> None:
    from moe_export.cli.main import COMMANDS

    page = generator.page()
    for name in COMMANDS:
        assert f"## `moe-export {name}`" in page
    assert "### `moe-export list families`" in page
    for option in ("--against", "--min-speedup", "--max-new-tokens", "--expert-lowering", "-h, --help"):
        assert f"`{option}" in page


def test_check_finds_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_stale_page_is_found(generator, tmp_path, monkeypatch, capsys)
