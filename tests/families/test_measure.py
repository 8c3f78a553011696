"""The measuring of families: broken engines are seen, and the page and the results follow the registry."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moe_export.models.families import FAMILIES, family
from moe_export.trace import LayerTrace, TracedRun
from tests.helpers.tools import check_stale_page_is_found, tool

measuring = tool("measure_families")
page = tool("generate_families_doc")
TOKENS, EXPERTS = 6, 4


def run(seed: int = 0) -> TracedRun:
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(EXPERTS)[:2] for _ in range(TOKENS)]).astype(np.int32)
    weights = generator.random((TOKENS, 2)).astype(np.float32)
    hidden, output = generator.random((2, TOKENS, 3), dtype=np.float32)
    logits = generator.standard_normal((2, 3, 5)).astype(np.float32)
    return TracedRun({"logits": logits}, (LayerTrace(0, "mlp", ids, weights, hidden, output),))


def problems(engine: TracedRun, mask: np.ndarray | None = None) -> list[str]:
    judge = measuring.Judge("portable", 1e-5)
    judge.compare("case", run(), engine, [np.ones((2, 3), np.int64) if mask is None else mask])
    return judge.problems


def changed(**layer) -> TracedRun:
    good = run()
    return TracedRun(good.outputs, (dataclasses.replace(good.layers[0], **layer),))


def test_an_equal_engine_has_no_problems_whatever_the_order_of_experts() -> None:
    assert problems(run()) == []
    layer = run().layers[0]
    swapped = changed(expert_ids=layer.expert_ids[:, ::-1], weights=layer.weights[:, ::-1])
    assert problems(swapped) == []


@pytest.mark.parametrize(
    "broken",
    [
        lambda x: x * 2,
        np.zeros_like,
        lambda x: x[::-1],
        lambda x: x + np.nan,
        lambda x: x[:, :2],
        lambda x: x + 1e-3,
    ],
    ids=["doubled", "zeroed", "reversed", "nan", "shorter", "offset"],
)
def test_broken_logits_are_seen(broken) -> None:
    good = run()
    found = problems(TracedRun({"logits": broken(good.outputs["logits"])}, good.layers))
    assert len(found) == 1 and "logits differ by" in found[0]


def test_an_expert_swapped_at_one_token_is_seen_and_named() -> None:
    ids = run().layers[0].expert_ids.copy()
    ids[4, 0] = next(e for e in range(EXPERTS) if e not in ids[4])
    found = problems(changed(expert_ids=ids))
    assert len(found) == 1 and "mlp: token 4 goes to" in found[0]


def test_a_dropped_token_is_seen() -> None:
    ids = run().layers[0].expert_ids.copy()
    ids[2] = -1
    assert "token 2 goes to [-1, -1]" in problems(changed(expert_ids=ids))[0]


def test_scaled_weights_are_seen() -> None:
    assert "weights differ by" in problems(changed(weights=run().layers[0].weights * 1.001))[0]


def test_a_missing_layer_is_seen() -> None:
    assert "0 MoE layers in the engine, 1 in the model" in problems(TracedRun(run().outputs, ()))[0]


def test_padding_is_not_compared() -> None:
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    engine = run()
    engine.outputs["logits"][0, 0] = 7
    ids = engine.layers[0].expert_ids
    ids[0] = ids[0, ::-1] + 1
    assert problems(engine, mask) == []
    assert len(problems(engine)) == 2


def test_every_class_is_measured_and_within_its_tolerance() -> None:
    results = measuring.read_results()
    for entry in FAMILIES.values():
        for model_class in entry.classes:
            row = results.get(model_class)
            assert row is not None, f"run python tools/measure_families.py {entry.name}"
            fresh = row.configuration == measuring.fingerprint(entry, model_class)
            assert fresh, f"{entry.name} changed; run python tools/measure_families.py {entry.name}"
            assert not row.problems
            assert max(row.max_error.values()) <= entry.tolerance
            assert row.tokens > 0 or row.moe_layers == 0
            assert row.moe_layers > 0 or entry.status == "limited"
    assert set(results) == {cls for entry in FAMILIES.values() for cls in entry.classes}


def test_fingerprint_follows_the_measured_model() -> None:
    entry = family("mixtral")
    first = measuring.fingerprint(entry, entry.model_class)
    changed_entry = dataclasses.replace(entry, tiny={**entry.tiny, "num_local_experts": 5})
    assert measuring.fingerprint(changed_entry, entry.model_class) != first
    assert measuring.fingerprint(dataclasses.replace(entry, routing="other"), entry.model_class) == first


def test_results_are_kept_and_foreign_classes_dropped(tmp_path: Path) -> None:
    row = next(iter(measuring.read_results().values()))
    path = tmp_path / "results.json"
    gone = dataclasses.replace(row, model_class="Gone")
    measuring.write_results({row.model_class: row, "Gone": gone}, path)
    assert measuring.read_results(path) == {row.model_class: row}


def test_page_is_fresh() -> None:
    written = page.PAGE.read_text(encoding="utf-8")
    assert written == page.page(), "run python tools/generate_families_doc.py"


def test_page_names_every_family() -> None:
    text = page.page()
    for name, entry in FAMILIES.items():
        assert f"| {name} |" in text
        assert entry.reason in text
    assert "not measured" not in text


def test_check_finds_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_stale_page_is_found(page, tmp_path, monkeypatch, capsys)
