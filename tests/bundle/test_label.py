"""Names of bundles in reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_export.bundle.label import bundle_label
from moe_export.bundle.writer import BundleWriter


@pytest.mark.parametrize("name", ["demo", ".hidden", "v1.partial", "a.partial-b"])
def test_a_folder_keeps_its_name(tmp_path: Path, name: str) -> None:
    assert bundle_label(tmp_path / name) == name


def test_an_unfinished_bundle_has_the_name_it_will_get(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "engine.v1") as writer:
        assert writer.path.name != "engine.v1"
        assert bundle_label(writer.path) == "engine.v1"
