"""Presets: the published models are there, cited, and counted as their publishers count them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from moe_export.costs import FORMATS
from moe_export.errors import SourceError
from moe_export.inspect import inspect_path
from moe_export.inspect.presets import RULES, Published, find_preset, get_preset, presets

WANTED = (
    "mixtral-8x7b", "mixtral-8x22b", "deepseek-v2-lite", "deepseek-v3", "switch-base-8", "switch-base-16",
    "switch-base-32", "switch-base-64", "switch-base-128", "switch-base-256", "switch-large-128", "switch-c",
    "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-20b", "gpt-oss-120b",
    "phi-3.5-moe", "granite-3.0-1b-a400m", "granite-3.0-3b-a800m", "llama-4-scout", "llama-4-maverick",
    "glm-4.5", "kimi-k2", "llama-2-70b", "mistral-7b",
)  # fmt: skip
FIGURES = [(preset.name, figure) for preset in presets().values() for figure in preset.published]

# Billions as published, by the publisher's own rule, each within 1 % without any allowance for rounding.
EXACT = {
    ("mixtral-8x7b", "total"): 46.7,
    ("mixtral-8x7b", "active"): 12.9,
    ("mixtral-8x22b", "total"): 141,
    ("mixtral-8x22b", "active"): 39,
    ("deepseek-v3", "total"): 671,
    ("deepseek-v3", "active"): 36.7,  # given as 36.7B with the weights and rounded to 37B in the report
    ("deepseek-v2-lite", "total"): 15.7,
    ("switch-base-128", "total"): 7.4,
    ("switch-large-128", "total"): 26.3,
    ("switch-c-2048", "total"): 1571,
    ("olmoe-1b-7b", "total"): 6.9,
    ("qwen1.5-moe-a2.7b", "total"): 14.3,
    ("qwen1.5-moe-a2.7b", "active"): 2.7,
    ("qwen3-30b-a3b", "total"): 30.5,
    ("qwen3-235b-a22b", "total"): 235,
    ("qwen3-235b-a22b", "active"): 22,
    ("gpt-oss-20b", "total"): 20.91,
    ("gpt-oss-20b", "active"): 3.61,
    ("gpt-oss-120b", "total"): 116.83,
    ("gpt-oss-120b", "active"): 5.13,
    ("phi-3.5-moe", "total"): 41.9,
    ("phi-3.5-moe", "active"): 6.6,
    ("llama-4-scout", "total"): 109,
    ("llama-4-maverick", "total"): 400,
    ("glm-4.5", "total"): 355,
    ("glm-4.5", "active"): 32,
    ("kimi-k2", "total"): 1040,
    ("kimi-k2", "active"): 32.6,
    ("llama-2-70b", "total"): 69,
    ("mistral-7b", "total"): 7.24,
}


@pytest.mark.parametrize("name", WANTED)
def test_wanted_presets_are_there(name: str) -> None:
    preset = get_preset(name)
    assert preset.source.startswith("https://")
    assert preset.weights in FORMATS
    assert preset.name == preset.name.lower()
    assert sum(preset.architecture.parameters().values()) > 0


@pytest.mark.parametrize(("name", "figure"), FIGURES, ids=[f"{n} {f.count} {f.text}" for n, f in FIGURES])
def test_published_figures(name: str, figure: Published) -> None:
    arch = get_preset(name).architecture
    assert figure.source.startswith("https://")
    assert figure.rule in RULES
    assert figure.agrees(arch), f"{figure.ours(arch):.3f} B against {figure.text}"
    if figure.step:
        assert figure.note, "an allowance for rounding needs its reason"


@pytest.mark.parametrize(("name", "count"), EXACT)
def test_published_within_one_percent(name: str, count: str) -> None:
    wanted = EXACT[name, count]
    figure = next(
        f for f in get_preset(name).published if (f.count, f.billions) == (count, wanted) and not f.step
    )
    assert figure.ours(get_preset(name).architecture) == pytest.approx(wanted, rel=0.01)


def test_a_wrong_figure_is_noticed() -> None:
    arch = get_preset("mixtral-8x7b").architecture
    figure = get_preset("mixtral-8x7b").published[0]
    assert not replace(figure, billions=figure.billions * 1.02).agrees(arch)
    assert not replace(figure, rule="without_embeddings_and_head", billions=47.0).agrees(arch)
    with pytest.raises(SourceError, match="unknown count"):
        replace(figure, count="activated")


def test_rules_count_different_things() -> None:
    arch = get_preset("kimi-k2").architecture
    ours = {rule: Published("total", 1.0, rule, "", "https://").ours(arch) for rule in RULES}
    embeddings = arch.parameters()["embeddings"] / 1e9
    assert ours["all"] - ours["without_embeddings"] == pytest.approx(embeddings)
    assert ours["all"] - ours["without_embeddings_and_head"] == pytest.approx(2 * embeddings)
    # One more layer of experts: 384 and a shared one of 3 matrices, and a router, instead of a dense block.
    layer = (385 * 3 * 2048 + 384 - 3 * 18432) * 7168 / 1e9
    assert ours["experts_in_every_layer"] - ours["all"] == pytest.approx(layer)


@pytest.mark.parametrize(
    ("name", "found"),
    [("Qwen1.5-MoE-A2.7B", "qwen1.5-moe-a2.7b"), ("qwen1-5-moe-a2-7b", "qwen1.5-moe-a2.7b"),
     ("Mixtral 8x7B", "mixtral-8x7b"), ("GLM_4.5", "glm-4.5"), ("switch-c", "switch-c-2048")],
)  # fmt: skip
def test_names_are_found_as_people_write_them(name: str, found: str) -> None:
    preset = find_preset(name)
    assert preset is not None
    assert preset.name == found


def test_unknown_preset() -> None:
    assert find_preset("mixtrl-8x7b") is None
    with pytest.raises(SourceError, match="nearest: mixtral-8x7b"):
        get_preset("mixtrl-8x7b")
    with pytest.raises(SourceError, match="nearest: mixtral-8x7b"):
        inspect_path("mixtrl-8x7b")


def test_names_are_unique() -> None:
    names = [name for preset in presets().values() for name in (preset.name, *preset.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_published_checkpoint_sizes(name: str, gib: float) -> None:
    """The gpt-oss model card (arXiv 2508.10925, table 1) gives the size of its MXFP4 checkpoints."""
    size = inspect_path(name).needs["weights_bytes"]["mxfp4"]
    assert size / 2**30 == pytest.approx(gib, rel=0.01)


def test_a_preset_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from moe_export.inspect.summary import inspect_path; inspect_path('deepseek-v3'); "
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_summary_of_a_preset() -> None:
    summary = inspect_path("deepseek-v3")
    assert summary.kind == "preset"
    assert summary.parameters["total"] == 671_026_404_352
    assert summary.parameters["active_without_embeddings"] == 36_625_603_584
    assert len(summary.moe_layers) == 58
    parts = summary.components
    assert sum(p["total"] for p in parts.values()) == summary.parameters["total"]
    assert sum(p["active"] for p in parts.values()) == summary.parameters["active"]
    assert parts["routed_experts"]["active"] * 256 == parts["routed_experts"]["total"] * 8
    assert any("multi-token prediction" in note for note in summary.notes)
    assert all(figure["agrees"] for figure in summary.published)
    assert summary.counting_rule
