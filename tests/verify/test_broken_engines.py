"""The heart of verification: every broken engine must fail, and what is broken must be named rightly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_export.verify import Finding, ParityReport, verify_bundle
from tests.helpers.tiny_bundle import BROKEN, TinyReference, make_tiny_bundle
from tests.helpers.tiny_model import TinyWeights
from tests.verify import engines

WEIGHTS = TinyWeights.make()


def verify(bundle: Path, **options: Any) -> ParityReport:
    return verify_bundle(bundle, against=TinyReference(), threads=1, **options)


def only(report: ParityReport) -> Finding:
    assert not report.passed
    assert len(report.findings) == 1, [f.message for f in report.findings]
    return report.findings[0]


def failed(report: ParityReport) -> set[str]:
    return {c.name for c in report.cases if not c.passed}


def test_the_right_engine_passes(tmp_path: Path) -> None:
    report = verify(make_tiny_bundle(tmp_path / "b"))
    assert report.passed and not report.findings and not failed(report)
    summary = report.summary()
    assert (
        summary["max_error"] < 1e-4 and summary["route_agreement"] == 1.0 and summary["routed_tokens"] > 500
    )
    assert all(not c.unused_experts and c.weight_tokens == c.routed_tokens > 0 for c in report.coverage)
    assert {c.mode for c in report.cases} == {"free"}


EXPECTED: dict[str, tuple[str, int, str]] = {
    "expert_swapped": ("wrong expert", 1, "experts 0, 1"),
    "weights_scaled": ("wrong router weights", 0, "1.1 times"),
    "router_bias_dropped": ("wrong router", 0, "router's bias is missing"),
    "token_dropped": ("dropped token", 1, "no expert output"),
    "no_renormalise": ("wrong router weights", 0, "not renormalised"),
    "cache_shifted": ("KV cache", 0, "only when tokens come in pieces"),
    "rope_offset": ("before the MoE", 0, "RoPE"),
}


def test_every_known_defect_is_expected_here() -> None:
    assert EXPECTED.keys() == BROKEN.keys()


@pytest.mark.parametrize(
    ("broken", "force_routing"),
    [(b, False) for b in BROKEN] + [("expert_swapped", True), ("weights_scaled", True)],
)
def test_known_defects_fail_and_are_named(tmp_path: Path, broken: str, force_routing: bool) -> None:
    report = verify(make_tiny_bundle(tmp_path / "b", broken=broken), force_routing=force_routing)
    assert force_routing == report.force_routing
    kind, layer, words = EXPECTED[broken]
    finding = only(report)
    assert (finding.kind, finding.layer) == (kind, layer), finding.message
    assert words in finding.message and finding.layer_name == f"layers.{layer}.moe"
    assert finding.token is not None and finding.batch is not None and finding.position is not None
    assert set(finding.cases) == failed(report)


def test_details_of_known_defects(tmp_path: Path) -> None:
    reports = {
        b: verify(make_tiny_bundle(tmp_path / b, broken=b))
        for b in ("expert_swapped", "cache_shifted", "rope_offset", "token_dropped", "no_renormalise")
    }
    assert reports["expert_swapped"].findings[0].experts == (0, 1)
    chunked = {c.name for c in reports["cache_shifted"].cases if "chunked" in c.tags}
    assert failed(reports["cache_shifted"]) == chunked
    # A query rotated one position too far sees only itself at position 0, so nothing is wrong there.
    assert reports["rope_offset"].findings[0].position == 1
    assert "one token" not in failed(reports["rope_offset"])
    maximum = next(c for c in reports["token_dropped"].cases if c.name == "maximum")
    batch, length = maximum.inputs["input_ids"]
    dropped = reports["token_dropped"].findings[0]
    assert (dropped.batch, dropped.position) == (batch - 1, length - 1)
    assert "instead of 1" in reports["no_renormalise"].findings[0].message


def test_failing_checks_show_coordinates_values_limit_and_reason(tmp_path: Path) -> None:
    report = verify(make_tiny_bundle(tmp_path / "b", broken="expert_swapped"))
    failures = [k for c in report.cases for k in c.failures]
    assert {"logits", "logits.rms", "moe.output", "moe.output.rms"} <= {k.level for k in failures}
    assert not any(
        k.level.startswith(("moe.routing", "moe.weights")) and k.subject == "layers.1.moe" for k in failures
    )
    for check in failures:
        assert check.reason and check.limit > 0 or check.level == "logits.top1"
        if check.level in ("logits", "moe.output"):
            assert "got" in check.detail and "reference" in check.detail and "[" in check.detail


CUSTOM: dict[str, tuple[Callable[[], tuple[TinyWeights, Any]], str, int | None, str, tuple[int, ...]]] = {
    "one expert": (
        lambda: (
            engines.change_layer(WEIGHTS, 0, down=engines.scaled(WEIGHTS.layers[0].down, 1.05, 2)),
            None,
        ),
        "wrong expert",
        0,
        "exactly where they use expert 2",
        (2,),
    ),
    "every expert": (
        lambda: (engines.change_layer(WEIGHTS, 1, down=WEIGHTS.layers[1].down * np.float32(1.01)), None),
        "wrong expert",
        1,
        "1.01 times the source model's",
        (),
    ),
    "router weights": (
        lambda: (engines.change_layer(WEIGHTS, 1, router=WEIGHTS.layers[1].router[:, ::-1].copy()), None),
        "wrong router",
        1,
        "router's weights or bias are wrong",
        (),
    ),
    "slightly wrong router": (
        lambda: (
            engines.change_layer(WEIGHTS, 0, router=engines.scaled(WEIGHTS.layers[0].router, 1.002)),
            None,
        ),
        "wrong router",
        0,
        "Router logits differ although the layer's input agrees",
        (),
    ),
    "head": (
        lambda: (engines.dataclasses.replace(WEIGHTS, head=engines.scaled(WEIGHTS.head, 1.01, 3)), None),
        "after the MoE",
        None,
        "every MoE layer agrees",
        (),
    ),
    "embedding": (
        lambda: (engines.dataclasses.replace(WEIGHTS, embedding=WEIGHTS.embedding + np.float32(0.01)), None),
        "before the MoE",
        0,
        "the first token of a sequence is wrong too",
        (),
    ),
    "norm between layers": (
        lambda: (
            engines.change_layer(WEIGHTS, 1, moe_norm=engines.scaled(WEIGHTS.layers[1].moe_norm, 1.01, 5)),
            None,
        ),
        "before the MoE",
        1,
        "layers.0.moe agrees",
        (),
    ),
    "attention mask": (
        lambda: (WEIGHTS, engines.ignore_padding),
        "attention mask",
        0,
        "only with padding",
        (),
    ),
    "dropped assignment": (
        lambda: (WEIGHTS, engines.drop_assignment),
        "dropped token",
        0,
        "drops assignments",
        (),
    ),
    "NaN in an expert": (
        lambda: (
            engines.change_layer(WEIGHTS, 1, up=engines.scaled(WEIGHTS.layers[1].up, np.nan, 3, 0, 0)),
            None,
        ),
        "not a number",
        1,
        "every token is wrong",
        (),
    ),
    "NaN in the head": (
        lambda: (engines.dataclasses.replace(WEIGHTS, head=engines.scaled(WEIGHTS.head, np.nan, 3, 7)), None),
        "not a number",
        None,
        "nan",
        (),
    ),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_more_defects_fail_and_are_named(tmp_path: Path, name: str) -> None:
    make, kind, layer, words, experts = CUSTOM[name]
    weights, edit = make()
    finding = only(verify(engines.bundle_of(tmp_path / "b", weights, edit=edit)))
    assert (finding.kind, finding.layer, finding.experts) == (kind, layer, experts), finding.message
    assert words in finding.message


def test_two_defects_are_both_found_when_routing_is_forced(tmp_path: Path) -> None:
    """A wrong router in layer 0 hides an expert of layer 1 in free runs; replayed routing brings it out."""
    weights = engines.change_layer(WEIGHTS, 1, down=engines.scaled(WEIGHTS.layers[1].down, 1.05, 2))
    report = verify(engines.bundle_of(tmp_path / "b", weights, "no_renormalise"))
    found = {(f.kind, f.layer, f.experts) for f in report.findings}
    assert found == {("wrong router weights", 0, ()), ("wrong expert", 1, (2,))}


def test_a_near_tie_that_flips_in_float32_is_judged_with_routing_forced(tmp_path: Path) -> None:
    """Two experts with equal router columns tie at every token; an engine that prefers the other one is
    right."""
    layer = WEIGHTS.layers[0]
    router, bias = layer.router.copy(), layer.router_bias.copy()
    router[:, 3], bias[3] = router[:, 1], bias[1]
    reference = engines.change_layer(WEIGHTS, 0, router=router, router_bias=bias)
    bias = bias.copy()
    bias[3] += np.float32(2e-7)
    engine = engines.change_layer(reference, 0, router_bias=bias)
    bundle = engines.bundle_of(tmp_path / "b", engine)
    report = verify_bundle(bundle, against=TinyReference(reference), threads=1)
    assert report.passed, [f.message for f in report.findings]
    assert report.summary()["near_ties"] > 20
    assert any(c.mode == "forced" and c.passed for c in report.cases)
    free = next(c for c in report.cases if c.name == "prose" and c.mode == "free")
    assert any(
        k.level == "logits" and not k.judged and not k.passed and "near tie" in k.reason for k in free.checks
    )

    broken = engines.change_layer(engine, 1, down=engines.scaled(WEIGHTS.layers[1].down, 1.05, 2))
    report = verify_bundle(
        engines.bundle_of(tmp_path / "c", broken), against=TinyReference(reference), threads=1
    )
    finding = only(report)
    assert (finding.kind, finding.layer, finding.experts) == ("wrong expert", 1, (2,)), finding.message


@pytest.fixture(scope="module")
def low() -> TinyWeights:
    return engines.bfloat16_weights(WEIGHTS)


def test_bfloat16_engine_passes_on_forced_routing(tmp_path: Path, low: TinyWeights) -> None:
    report = verify(engines.bundle_of(tmp_path / "b", low, dtype="bfloat16"))
    assert report.passed, [f.message for f in report.findings]
    assert {c.mode for c in report.cases} == {"free", "forced"}
    summary = report.summary()
    assert 0.9 < summary["route_agreement"] < 1.0 and summary["near_ties"] > 0
    free = next(c for c in report.cases if c.name == "prose" and c.mode == "free")
    assert not any(k.judged for k in free.checks if k.level == "logits")
    assert all(
        k.judged for k in free.checks if k.level in ("logits.kl", "logits.cross_entropy", "moe.routing")
    )


def test_a_low_precision_engine_that_is_exact_elsewhere_may_not_be_a_little_wrong_somewhere(
    tmp_path: Path, low: TinyWeights
) -> None:
    """Source and engine hold the same bfloat16 weights, so one expert off by 5 % is far from rounding."""
    reference = TinyReference(low)
    right = verify_bundle(
        engines.bundle_of(tmp_path / "b", low, dtype="bfloat16"), against=reference, threads=1
    )
    assert right.passed
    wrong = engines.change_layer(low, 1, down=engines.scaled(low.layers[1].down, 1.05, 2))
    path = engines.bundle_of(tmp_path / "c", wrong, dtype="bfloat16")
    finding = only(verify_bundle(path, against=reference, threads=1))
    assert (finding.kind, finding.layer, finding.experts) == ("wrong expert", 1, (2,)), finding.message


def test_bfloat16_engine_fails_float32_limits(tmp_path: Path, low: TinyWeights) -> None:
    assert not verify(engines.bundle_of(tmp_path / "b", low)).passed


@pytest.mark.parametrize("broken", BROKEN)
def test_known_defects_in_bfloat16(tmp_path: Path, low: TinyWeights, broken: str) -> None:
    report = verify(engines.bundle_of(tmp_path / "b", low, broken, dtype="bfloat16"))
    kind, layer, _words = EXPECTED[broken]
    assert not report.passed
    assert (report.findings[0].kind, report.findings[0].layer) == (kind, layer), [
        f.message for f in report.findings
    ]


def test_a_tolerance_can_be_widened_and_narrowed(tmp_path: Path) -> None:
    weights = engines.dataclasses.replace(WEIGHTS, head=WEIGHTS.head * np.float32(1.0005))
    bundle = engines.bundle_of(tmp_path / "b", weights)
    assert not verify(bundle).passed
    wide = {"logits": 1e-2, "logits.rms": 1e-2, "logits.kl": 1e-3, "logits.cross_entropy": 1e-1}
    assert verify(bundle, tolerances=wide).passed
    assert not verify(make_tiny_bundle(tmp_path / "c"), tolerances={"logits": 1e-9}).passed
