"""docs/ops.md is what the contracts say."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moe_export.ops import OPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_ops_doc", ROOT / "tools" / "generate_ops_doc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_fresh(generator: ModuleType) -> None:
    written = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    assert written == generator.page(), "run python tools/generate_ops_doc.py"


def test_every_name_and_tolerance_is_in_its_ops_section(generator: ModuleType) -> None:
    sections = dict(part.split("`", 1) for part in generator.page().split("\n## `")[1:])
    assert list(sections) == list(OPS)
    for op in OPS.values():
        for named in (*op.inputs, *op.outputs, *op.attributes):
            assert f"| `{named.name}`" in sections[op.name]
        for dtype, tolerance in op.tolerance.items():
            assert f"| {dtype} | {tolerance.max:g} | {tolerance.rms:g} |" in sections[op.name]


def test_another_contract_gives_another_page(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = generator.page()
    changed = dataclasses.replace(OPS["Combine"], summary="Something else | and a bar")
    monkeypatch.setitem(generator.OPS, "Combine", changed)
    assert generator.page() != before
    assert "Something else \\| and a bar." in generator.page()


def test_check_finds_a_stale_page(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "ops.md"
    monkeypatch.setattr(generator, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["generate_ops_doc.py", "--check"])
    assert generator.main() == 1
    page.write_text(generator.page() + "stale", encoding="utf-8")
    assert generator.main() == 1
    assert "is stale" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["generate_ops_doc.py"])
    assert generator.main() == 0
    monkeypatch.setattr(sys, "argv", ["generate_ops_doc.py", "--check"])
    assert generator.main() == 0
