"""Code that a manifest names is never run unasked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moe_export.bench.source import find_source
from moe_export.bundle.reader import open_bundle
from moe_export.errors import UsageError
from moe_export.schema import Manifest
from moe_export.verify.yardstick import find_yardstick
from tests.helpers.tiny_bundle import make_tiny_bundle


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    code = tmp_path / "model.py"
    code.write_text("raise SystemExit('this must not run')\n", encoding="utf-8")
    found = open_bundle(make_tiny_bundle(tmp_path / "bundle")).manifest
    return dataclasses.replace(found, source=dataclasses.replace(found.source, path=f"{code}:build"))


def test_verify_asks_for_the_source_by_name(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=r"not run unasked.*--against .*model\.py:build"):
        find_yardstick(None, manifest)


def test_bench_leaves_the_baselines_out_with_the_reason(manifest: Manifest, tmp_path: Path) -> None:
    found = find_source(manifest, None, tmp_path)
    assert found.path is None and found.label.endswith("model.py:build")
    assert "not run unasked" in found.reason and "--source" in found.reason
