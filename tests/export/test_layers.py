"""``layers``: an engine of a model's first layers, which says so, verified against the source cut the same "
"way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moe_export.api import build, export
from moe_export.bundle.manifest import read_manifest
from moe_export.config import BuildConfig
from moe_export.errors import UsageError
from moe_export.models.families import FAMILIES
from moe_export.runtime.session import load
from moe_export.verify import verify_bundle
from tests.importer.test_first_layers import LEFT, damage, deep

OPTIONS: dict[str, Any] = {"target": "portable", "bench": False, "threads": 1}
TRIAL = "a trial: the first 1 of the source's 3 layers, not all of it"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three layers in several files, of which the last two layers' weights are no numbers."""
    folder = tmp_path_factory.mktemp("layers") / "mixtral"
    deep("mixtral").save_pretrained(folder, max_shard_size="20KB")
    assert damage(folder, "layers.1.") and damage(folder, "layers.2.")
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("layers") / "engine", layers=1, **OPTIONS).path


def test_it_is_verified_and_says_what_it_is(built: Path) -> None:
    manifest = read_manifest(built)
    assert (manifest.source.layers, manifest.source.all_layers) == (1, 3)
    assert manifest.evidence["parity"]["passed"] is True
    assert len(manifest.moe_layers) == 1
    assert manifest.notes[0] == TRIAL
    assert TRIAL in (built / "evidence" / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    with load(built, threads=1) as session:
        assert session.notes[0] == TRIAL
        assert session.run({"input_ids": np.array([[3, 4, 5]])})["logits"].shape == (1, 3, 128)


def test_it_is_verified_again_against_the_same_layers(built: Path, source: Path, tmp_path: Path) -> None:
    report = verify_bundle(built, threads=1)
    assert report.passed
    other = tmp_path / "other"
    shutil.copytree(source, other)
    model = deep("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data *= 1.5
    model.save_pretrained(other, max_shard_size="20KB")
    assert not verify_bundle(built, against=other, threads=1).passed


def test_the_same_build_is_not_done_twice_and_another_number_is(
    built: Path, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(built, tmp_path / "engine")
    again = build(source, tmp_path / "engine", layers=1, **OPTIONS)
    assert again.manifest.created == read_manifest(built).created
    with pytest.raises(UsageError, match="exists already"):
        build(source, tmp_path / "engine", layers=1, **{**OPTIONS, "verify": False})


def test_an_export_by_reference_shares_only_the_files_that_it_needs(
    built: Path, source: Path, tmp_path: Path
) -> None:
    path = export(source, tmp_path / "onnx", weights="reference", layers=1)
    manifest = read_manifest(path)
    assert manifest.source.layers == 1 and manifest.notes[0] == TRIAL
    shared = {p.name for p in (path / "checkpoint").iterdir()}
    every = {p.name for p in source.glob("*.safetensors")}
    assert shared < every
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    assert not [i.name for i in graph.initializer if "layers.1." in i.name or "layers.2." in i.name]
    ids = {"input_ids": np.array([[3, 4, 5, 9]])}
    with load(path, threads=1) as session, load(built, threads=1) as other:
        np.testing.assert_allclose(session.run(ids)["logits"], other.run(ids)["logits"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in LEFT if family != "mixtral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Dense first layers, sliding windows, a hybrid, an encoder with a decoder."""
    deep(family).save_pretrained(tmp_path / "source")
    # The family's own tolerance, which says why where it is wider than usual.
    tolerances = {"logits": FAMILIES[family].tolerance}
    options = {**OPTIONS, "layers": LEFT[family], "tolerances": tolerances}
    bundle = build(tmp_path / "source", tmp_path / "engine", **options)
    assert bundle.manifest.source.layers == LEFT[family]
    assert bundle.manifest.evidence["parity"]["passed"] is True


@pytest.mark.slow
def test_target_onnxruntime_and_a_live_model(tmp_path: Path) -> None:
    options = {**OPTIONS, "target": "onnxruntime"}
    bundle = build(deep("mixtral"), tmp_path / "engine", layers=2, **options)
    assert (bundle.manifest.source.layers, len(bundle.manifest.moe_layers)) == (2, 2)
    assert bundle.manifest.evidence["parity"]["passed"] is True


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_wrong_numbers(value: Any) -> None:
    with pytest.raises(UsageError, match="layers: expected a whole number"):
        BuildConfig(layers=value)
