"""Every baseline on a real source model. Slow: exports and compiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_export.bench import BASELINES, BenchReport, bench_bundle
from moe_export.config import BuildConfig
from tests.test_repository import ROOT

pytestmark = pytest.mark.slow
QUICK: dict[str, Any] = {"sequence": (12,), "decode_tokens": 3, "rounds": 2, "threads": 1}
CONFIG = BuildConfig(verify=False, bench=False, threads=1)


def make_model(seed: int = 0) -> Any:
    """A Mixtral with random weights, two layers."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines") / "model"
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    from moe_export.api import build

    return build(str(source), source.parent / "bundle", CONFIG).path


@pytest.fixture(scope="module")
def report(bundle: Path) -> BenchReport:
    return bench_bundle(bundle, **QUICK)


def test_every_baseline_runs_or_says_why_not(report: BenchReport) -> None:
    running = {c.name for c in report.contestants}
    skipped = {s.contestant: s.reason for s in report.skipped if not s.workload}
    assert running | set(skipped) == {"engine", *BASELINES}
    assert "pytorch-eager" in running
    assert {"transformers-onnx", "transformers-onnx-fused"} <= running, skipped
    assert all(skipped.values())


def test_everybody_computes_what_eager_computes(report: BenchReport) -> None:
    assert {c.name: c.sanity.ok for c in report.contestants} == dict.fromkeys(report.order, True)
    errors = {c.name: c.sanity.max_error for c in report.contestants}
    assert all(error is not None and error < 1e-4 for error in errors.values()), errors


def test_times_of_everybody_in_every_real_workload(report: BenchReport) -> None:
    for phase in ("prefill", "decode"):
        rows = [r for r in report.rows if r.phase == phase and r.routing == "real"]
        assert [r.contestant for r in rows] == list(report.order)
    assert {r.contestant for r in report.rows if r.routing == "zipf"} == {"engine", "pytorch-eager"}
    reasons = {s.reason for s in report.skipped if s.contestant == "transformers-onnx" and s.workload}
    assert reasons == {"its routing cannot be replaced"}
    real = [r for r in report.ratios if r.routing == "real"]
    assert all(r.vs_eager and r.vs_best and r.best != "engine" for r in real)
    assert report.contestant("transformers-onnx").prepare_s


def test_another_model_as_source_does_not_take_part(bundle: Path, tmp_path: Path) -> None:
    make_model(seed=1).save_pretrained(tmp_path / "other")
    report = bench_bundle(bundle, source=tmp_path / "other", baselines=("pytorch-eager",), **QUICK)
    assert [s.contestant for s in report.skipped if not s.workload] == ["pytorch-eager"]
    assert "not the model this bundle was built from" in report.skipped[0].reason
    assert report.ratios[0].vs_eager is None


def test_a_live_model_as_source(bundle: Path) -> None:
    report = bench_bundle(bundle, source=make_model(), baselines=("pytorch-eager",), **QUICK)
    assert report.source == "a live MixtralForCausalLM"
    assert report.contestant("engine").sanity.ok is True
    wrong = bench_bundle(bundle, source=make_model(seed=1), baselines=("pytorch-eager",), **QUICK)
    assert wrong.contestant("engine").sanity.ok is False
    assert wrong.summary()["wrong_numbers"] == ["engine"]


def test_an_own_module_from_a_file_and_live(tmp_path: Path) -> None:
    from moe_export.api import build
    from moe_export.importer.sources import load_source

    source = f"{ROOT / 'examples' / 'own_module' / 'model.py'}:build"
    bundle = build(source, tmp_path / "own", CONFIG).path
    unasked = bench_bundle(bundle, baselines=("pytorch-eager",), routing=("real",), **QUICK)
    assert "not run unasked" in unasked.skipped[0].reason
    report = bench_bundle(
        bundle,
        source=source,
        baselines=("pytorch-eager", "transformers-onnx"),
        routing=("real",),
        **QUICK,
    )
    assert {r.phase for r in report.rows} == {"forward"}
    assert report.contestant("engine").sanity.ok is True
    assert {s.contestant: s.reason for s in report.skipped} == {
        "transformers-onnx": "transformers' exporter: transformers exports its own models only"
    }
    live = load_source(source).module
    report = bench_bundle(
        bundle, source=live, baselines=("pytorch-eager", "torch-compile"), routing=("real",), **QUICK
    )
    assert report.contestant("engine").sanity.ok is True
    assert report.contestant("pytorch-eager").peak_rss is None
    assert "live module" in {s.contestant: s.reason for s in report.skipped}["torch-compile"]
