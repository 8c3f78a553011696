"""``bench_bundle`` on real bundles, with and without the model they were built from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe_export.bench import BASELINES, BenchReport, bench_bundle, format_table
from moe_export.bundle.manifest import read_manifest
from moe_export.errors import BundleError, UsageError
from tests.helpers.tiny_bundle import make_tiny_bundle, write_manifest

QUICK: dict[str, Any] = {"sequence": (8, 16), "decode_tokens": 3, "rounds": 2, "threads": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def alone(tiny: Path) -> BenchReport:
    return bench_bundle(tiny, **QUICK)


def test_an_engine_alone_is_measured(alone: BenchReport) -> None:
    assert [c.name for c in alone.contestants] == ["engine"] == list(alone.order)
    assert [(r.phase, r.sequence, r.routing) for r in alone.rows] == [
        ("prefill", 8, "real"), ("prefill", 16, "real"), ("decode", 8, "real"), ("decode", 16, "real"),
        ("prefill", 16, "uniform"), ("prefill", 16, "zipf"), ("prefill", 16, "one-hot"),
    ]  # fmt: skip
    assert all(r.samples == 2 * 3 for r in alone.rows if r.phase == "decode")
    engine = alone.contestant("engine")
    assert engine.load_s > 0 and engine.first_run_s is not None
    assert engine.peak_rss is None or engine.peak_rss > 1 << 24
    assert alone.settings["inputs"] == "text"


def test_imbalance_stands_beside_the_time(alone: BenchReport) -> None:
    found = {r.routing: r.imbalance for r in alone.rows if r.phase == "prefill" and r.sequence == 16}
    assert found["uniform"] == 1.0
    assert found["one-hot"] == 2.0
    assert found["real"] is not None and 1.0 <= found["real"] <= 2.0
    assert all(r.imbalance is None for r in alone.rows if r.phase == "decode")


def test_baselines_without_a_source_are_skipped_with_the_reason(alone: BenchReport) -> None:
    skipped = {s.contestant: s.reason for s in alone.skipped}
    assert set(skipped) == set(BASELINES)
    assert all("built from a live model" in reason for reason in skipped.values())
    assert all(r.best is None and r.vs_eager is None for r in alone.ratios)


def test_the_report_survives_json_and_the_table_has_every_row(alone: BenchReport) -> None:
    assert BenchReport.from_dict(alone.to_dict()) == alone
    text = format_table(alone)
    assert text.count("| engine     |") >= len(alone.rows)


def test_fewer_baselines_and_routings(tiny: Path) -> None:
    report = bench_bundle(tiny, baselines=(), routing=("zipf",), warmup=0, **QUICK)
    assert report.skipped == ()
    assert {r.routing for r in report.rows} == {"zipf"}


def test_an_engine_without_cache_has_one_phase(tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path / "plain", cache=False, tokenizer=False)
    report = bench_bundle(folder, baselines=(), **QUICK)
    assert {r.phase for r in report.rows} == {"forward"}
    assert report.settings["inputs"] == "random values"


def test_a_source_that_is_gone_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path / "moved")
    manifest = read_manifest(folder)
    source = dataclasses.replace(manifest.source, path=str(tmp_path / "gone"))
    write_manifest(folder, dataclasses.replace(manifest, source=source))
    report = bench_bundle(folder, baselines=("pytorch-eager",), **QUICK)
    assert report.skipped[0].reason.startswith(f"the source is no longer at {tmp_path / 'gone'}")
    report = bench_bundle(tiny, source=tmp_path / "nowhere", baselines=("pytorch-eager",), **QUICK)
    assert "no source at" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"baselines": ("pytorch-eagle",)}, "nearest: pytorch-eager"),
        ({"rounds": 0}, "rounds: expected a whole number of 1 or more"),
        ({"warmup": -1}, "warmup: expected a whole number of 0 or more"),
        ({"threads": 0}, "threads: expected a whole number"),
        ({"routing": ("gauss",)}, "routing: unknown 'gauss'"),
        ({"source": 3}, "source: expected a folder"),
    ],
)
def test_nonsense_is_refused(tiny: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        bench_bundle(tiny, **{**QUICK, **options})


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path / "damaged")
    weights = folder / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 0xFF
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="damaged"):
        bench_bundle(folder, baselines=(), **QUICK)
    assert bench_bundle(folder, baselines=(), routing=("real",), trust=True, **QUICK).rows
