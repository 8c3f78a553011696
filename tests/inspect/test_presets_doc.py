"""docs/presets.md is what the presets and the GPU table say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moe_export.costs import GPUS
from moe_export.inspect.presets import presets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generator() -> ModuleType:
    path = ROOT / "tools" / "generate_presets_doc.py"
    spec = importlib.util.spec_from_file_location("generate_presets_doc", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_fresh(generator: ModuleType) -> None:
    written = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert written == generator.page(), "run python tools/generate_presets_doc.py"


def test_page_has_every_preset_figure_and_gpu(generator: ModuleType) -> None:
    page = generator.page()
    for preset in presets().values():
        assert f"| `{preset.name}` | " in page
        assert preset.source in page
        assert all(figure.source in page for figure in preset.published)
    assert all(f"| `{name}` | " in page for name in GPUS)
    assert "| `mixtral-8x7b` | 46.703 B | 12.880 B | 2 of 8 | 32 of 32 |" in page


def test_check_finds_a_stale_page(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "presets.md"
    monkeypatch.setattr(generator, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["generate_presets_doc.py", "--check"])
    assert generator.main() == 1
    monkeypatch.setattr(sys, "argv", ["generate_presets_doc.py"])
    assert generator.main() == 0
    monkeypatch.setattr(sys, "argv", ["generate_presets_doc.py", "--check"])
    assert generator.main() == 0
    page.write_text(page.read_text() + "stale")
    assert generator.main() == 1
    assert "is stale" in capsys.readouterr().err
