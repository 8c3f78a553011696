"""Engines with quantised experts: what the shipped model's pass, and that broken ones do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

import moe_export
from moe_export.errors import UsageError
from moe_export.models.reference import load_reference
from moe_export.ops.quantization import KINDS
from moe_export.schema import DTYPES
from moe_export.trace import Reference
from moe_export.verify import ParityReport, verify_bundle
from moe_export.verify.tolerance import LEVELS, QUANTIZED_LEVELS, default_tolerances

from .quantized import (
    Edit,
    broken_copy,
    gate_and_up_misplaced,
    scaled_expert,
    shifted_scales,
    swapped_nibbles,
)

OPS = {"qmoe": "QMoE", "plugin": "QuantizedExpertMLP"}
SOURCE = Path(__file__).parents[2] / "examples" / "byte-mixtral"


NIGHTLY = (pytest.mark.slow, pytest.mark.nightly)
ENGINES = [
    pytest.param((kind, lowering), id=f"{kind}-{lowering}", marks=NIGHTLY if slow else ())
    for kind, lowering, slow in (
        ("int8", "qmoe", False),
        ("int4", "qmoe", False),
        ("int8", "plugin", True),
        ("int4", "plugin", False),
    )
]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    kind, lowering = request.param
    if lowering == "plugin" and os.environ.get("MOE_EXPORT_CPU_PLUGIN") == "off":
        pytest.skip("switched off by MOE_EXPORT_CPU_PLUGIN=off")
    folder = tmp_path_factory.mktemp(lowering) / kind
    moe_export.build(
        SOURCE, folder, quantize=kind, quantized_lowering=lowering, bench=False, verify=False, threads=1
    )
    yield folder


def op_types(engine: Path) -> set[str]:
    return {node.op_type for node in onnx.load(engine / "model.onnx", load_external_data=False).graph.node}


@pytest.fixture(scope="module")
def reference(engine: Path) -> Reference:
    from moe_export.bundle.manifest import read_manifest

    return load_reference(SOURCE, read_manifest(engine))


@pytest.fixture(scope="module")
def report(engine: Path, reference: Reference) -> ParityReport:
    return verify_bundle(engine, against=reference, trust=True, threads=1)


def test_the_shipped_model_passes_with_its_three_numbers(report: ParityReport, engine: Path) -> None:
    summary, kind = report.summary(), engine.name
    assert op_types(engine) & {"QMoE", "QuantizedExpertMLP"} == {OPS[engine.parent.name[:-1]]}
    assert report.passed and report.quantization == kind, [f.message for f in report.findings]
    limits = {limit.name: limit.value for limit in report.tolerances}
    assert 0 < summary["forced_error"] < limits["logits"]
    assert 0 < 1 - summary["route_agreement"] < limits["moe.agreement"]
    assert 0 < summary["cross_entropy_change"] < limits["logits.cross_entropy"]
    # int8 is an order of magnitude nearer to its source than int4.
    assert (summary["forced_error"] < 0.02) == (kind == "int8")
    assert {case.mode for case in report.cases} == {"free", "forced"}
    assert ParityReport.from_dict(report.to_dict()).quantization == kind


EDITS: dict[str, tuple[Callable[[str], Edit], int, set[int]]] = {
    "one expert twice as large": (lambda at: scaled_expert(at, 0, 2.0), 2, {0}),
    "one expert half as large": (lambda at: scaled_expert(at, 3, 0.5), 2, {3}),
    "gate and up misplaced": (gate_and_up_misplaced, 1, set()),
    "scales of the next block": (shifted_scales, 1, set()),
    "nibbles swapped": (lambda at: swapped_nibbles(at, slice(None)), 2, set()),
    "nibbles of one expert swapped": (lambda at: swapped_nibbles(at, slice(3, 4)), 2, {3}),
}


SLOW = ("one expert twice as large", "scales of the next block")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in EDITS]
)
def test_a_broken_quantisation_fails(name: str, engine: Path, reference: Reference, tmp_path: Path) -> None:
    if "nibbles" in name and engine.name != "int4":
        pytest.skip("int8 codes are whole bytes")
    change, layer, experts = EDITS[name]
    folder = broken_copy(engine, tmp_path / "broken", change(f"experts.{layer}.{engine.name}"))
    broken = verify_bundle(folder, against=reference, trust=True, threads=1)
    assert not broken.passed
    first = broken.findings[0]
    assert first.layer == layer and first.kind == "wrong expert", first
    named = {e for finding in broken.findings if finding.layer == layer for e in finding.experts}
    assert experts <= named, [f.message for f in broken.findings]


def test_a_limit_can_be_set_by_the_user(engine: Path, reference: Reference) -> None:
    strict = {"moe.agreement": 0.0, "moe.expert": 1.0}
    report = verify_bundle(engine, against=reference, trust=True, threads=1, tolerances=strict)
    assert not report.passed
    kinds = {f.kind for f in report.findings}
    assert kinds == {"wrong router", "wrong expert"}
    assert any("moe.agreement (set by the user" in f.message for f in report.findings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_limits_of_quantised_engines(dtype: str, kind: str) -> None:
    plain, both = default_tolerances(dtype, ["logits"]), default_tolerances(dtype, ["logits"], None, kind)
    assert set(both.limits) == {*plain.limits, *QUANTIZED_LEVELS} and not both.exact_routing
    assert all(both[name].value >= plain[name].value for name in plain.limits)
    assert all(both[name].reason for name in both.limits)
    assert set(QUANTIZED_LEVELS).isdisjoint(LEVELS)


def test_the_page_has_the_limits() -> None:
    tables = {k: default_tolerances("float32", ["OUTPUT"], None, k).limits for k in KINDS}
    page = (SOURCE.parents[1] / "docs" / "quantization.md").read_text(encoding="utf-8")
    for name, limit in tables["int8"].items():
        measures = limit.measures.replace("|", "&#124;")
        row = f"| `{name}` | {limit.value:g} | {tables['int4'][name].value:g} | {measures} |"
        assert row in page, row


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(UsageError, match="int3.*int4, int8|int3.*int8, int4"):
        default_tolerances("float32", ["logits"], None, "int3")
    with pytest.raises(UsageError, match="moe.agreement"):
        default_tolerances("float32", ["logits"], {"moe.agreement": 0.1})
