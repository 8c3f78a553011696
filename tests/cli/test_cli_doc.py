"""docs/cli.md is what the commands say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli_doc", ROOT / "tools" / "generate_cli_doc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_fresh(generator: ModuleType) -> None:
    fresh = generator.page()
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == fresh, "run python tools/generate_cli_doc.py"


def test_page_has_every_command_and_option(generator: ModuleType) -> None:
    from moe_export.cli.main import COMMANDS

    page = generator.page()
    for name in COMMANDS:
        assert f"## `moe-export {name}`" in page
    assert "### `moe-export list families`" in page
    for option in ("--against", "--min-speedup", "--max-new-tokens", "--expert-lowering", "-h, --help"):
        assert f"`{option}" in page


def test_check_finds_a_stale_page(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "cli.md"
    monkeypatch.setattr(generator, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["generate_cli_doc.py", "--check"])
    assert generator.main() == 1
    page.write_text(generator.page() + "stale", encoding="utf-8")
    assert generator.main() == 1
    assert "is stale" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["generate_cli_doc.py"])
    assert generator.main() == 0
    monkeypatch.setattr(sys, "argv", ["generate_cli_doc.py", "--check"])
    assert generator.main() == 0
