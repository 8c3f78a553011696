"""docs/presets.md is what the presets and the GPU table say."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_export.costs import GPUS
from moe_export.inspect.presets import presets
from tests.helpers.tools import check_stale_page_is_found, tool

generator = tool("generate_presets_doc")


def test_page_is_fresh() -> None:
    written = generator.PAGE.read_text(encoding="utf-8")
    assert written == generator.page(), "run python tools/generate_presets_doc.py"


def test_page_has_every_preset_figure_and_gpu() -> None:
    page = generator.page()
    for preset in presets().values():
        assert f"| `{preset.name}` | " in page
        assert preset.source in page
        assert all(figure.source in page for figure in preset.published)
    assert all(f"| `{name}` | " in page for name in GPUS)
    assert "| `mixtral-8x7b` | 46.703 B | 12.880 B | 2 of 8 | 32 of 32 |" in page


def test_check_finds_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_stale_page_is_found(generator, tmp_path, monkeypatch, capsys)
