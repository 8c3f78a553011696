"""Verification as a whole: modules, failing engines and references, what is judged where, reports."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from moe_export.bundle.manifest import read_manifest
from moe_export.errors import UsageError
from moe_export.trace import TracedRun
from moe_export.verify import Check, ParityReport, verify_bundle, write_reports
from moe_export.verify.inputs import make_cases
from moe_export.verify.judge import fold, judge, judge_plain
from moe_export.verify.localise import localise
from moe_export.verify.tolerance import default_tolerances
from tests.helpers.tiny_bundle import TinyReference, make_tiny_bundle, write_manifest
from tests.helpers.tiny_model import TinyWeights
from tests.verify import engines


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    path = make_tiny_bundle(tmp_path_factory.mktemp("broken") / "b", broken="no_renormalise")
    return verify_bundle(path, against=TinyReference(), threads=1, seed=11)


def test_modules_without_moe_layers(tmp_path: Path) -> None:
    report = verify_bundle(
        engines.module_bundle(tmp_path / "m"), against=engines.ModuleReference(), threads=1
    )
    assert report.passed and len(report.cases) == 4 and report.summary()["route_agreement"] is None
    wrong = verify_bundle(
        engines.module_bundle(tmp_path / "w", 0.01), against=engines.ModuleReference(), threads=1
    )
    assert not wrong.passed and wrong.findings[0].kind == "dense" and "'output'" in wrong.findings[0].message
    forced = verify_bundle(tmp_path / "m", against=engines.ModuleReference(), threads=1, force_routing=True)
    assert forced.passed


def test_a_frozen_dimension_is_an_engine_error(tmp_path: Path) -> None:
    path = engines.module_bundle(tmp_path / "m", frozen=1)
    report = verify_bundle(path, against=engines.ModuleReference(), threads=1)
    assert not report.passed
    assert [c.name for c in report.cases if c.passed] == ["ones"]
    errors = [f for f in report.findings if f.kind == "engine error"]
    shapes = [f for f in report.findings if f.kind == "shape"]
    assert errors or shapes
    assert any(c.error.startswith("engine failed") or c.failures for c in report.cases if not c.passed)


class Failing(TinyReference):
    def run(self, inputs: dict[str, Any]) -> TracedRun:
        if inputs["input_ids"].shape == (1, 1):
            raise RuntimeError("cannot do length 1\nsecond line")
        return super().run(inputs)


def test_a_failing_reference_fails_its_case_and_is_named(bundle: Path, tmp_path: Path) -> None:
    report = verify_bundle(bundle, against=Failing(), threads=1)
    assert not report.passed
    assert [c.name for c in report.cases if not c.passed] == ["one token"]
    finding = report.findings[0]
    assert finding.kind == "reference" and finding.cases == ("one token",)
    assert "cannot do length 1" in finding.message and "second line" not in finding.message
    with pytest.raises(UsageError, match="reference failed"):
        verify_bundle(bundle, against=Failing(), threads=1, save_golden=tmp_path / "g.npz")
    assert not (tmp_path / "g.npz").exists()


class Lossy(TinyReference):
    """A source model that gives NaN."""

    def run(self, inputs: dict[str, Any]) -> TracedRun:
        run = super().run(inputs)
        logits = run.outputs["logits"].copy()
        logits[0, -1, 5] = np.nan
        return TracedRun({"logits": logits}, run.layers)


def test_nan_of_the_source_is_no_agreement(bundle: Path) -> None:
    report = verify_bundle(bundle, against=Lossy(), threads=1)
    assert not report.passed and report.findings[0].kind == "not a number"
    assert "reference nan" in report.findings[0].message


class Missing(TinyReference):
    def run(self, inputs: dict[str, Any]) -> TracedRun:
        run = super().run(inputs)
        return TracedRun({}, run.layers[:1])


def test_what_the_reference_lacks_is_not_passed_over(bundle: Path) -> None:
    report = verify_bundle(bundle, against=Missing(), threads=1)
    assert not report.passed
    details = " ".join(k.detail for c in report.cases for k in c.failures)
    assert "the reference gives no output 'logits'" in details and "the reference's run has 1" in details


def test_the_recorded_source_is_the_default(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not record where"):
        verify_bundle(bundle)
    copy = make_tiny_bundle(tmp_path / "b")
    recorded = read_manifest(copy)
    gone = dataclasses.replace(recorded.source, path=str(tmp_path / "gone"))
    write_manifest(copy, dataclasses.replace(recorded, source=gone))
    with pytest.raises(UsageError, match=r"gone.*does not exist"):
        verify_bundle(copy)


def test_unknown_tolerance_is_refused_with_choices(bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"'logit'; nearest: logits"):
        verify_bundle(bundle, against=TinyReference(), tolerances={"logit": 1.0})


def test_a_given_text_is_used(bundle: Path) -> None:
    report = verify_bundle(
        bundle, against=TinyReference(), text="Some text of my own, long enough.", threads=1
    )
    case = next(c for c in report.cases if c.name == "given text")
    assert report.passed and case.inputs["input_ids"] == (1, 33)
    assert case.logits is not None and case.logits.cross_entropy is not None


def test_seeds_are_recorded(failing: ParityReport) -> None:
    assert failing.seed == 11
    assert all(c.seed is None or c.seed >= 11 for c in failing.cases)
    assert any(c.seed is not None for c in failing.cases)


@pytest.fixture(scope="module")
def judged(bundle: Path) -> Any:
    """One random case, its reference run, and the manifest."""
    manifest = read_manifest(bundle)
    case = next(c for c in make_cases(manifest)[0] if c.name == "random")
    return case, TinyReference().run(case.inputs), manifest


def test_an_optimiser_that_breaks_only_the_plain_engine_is_named(judged: Any) -> None:
    case, reference, manifest = judged
    tolerances = default_tolerances("float32", ["logits"])
    twin = judge(case, "free", reference, reference, manifest, tolerances)
    assert twin.result.passed and not twin.undecided
    same = judge_plain(twin, reference.outputs, reference, manifest, tolerances)
    assert same.result.passed and same.twin_agrees
    broken = judge_plain(
        twin, {"logits": reference.outputs["logits"] * 1.01}, reference, manifest, tolerances
    )
    assert not broken.result.passed and not broken.twin_agrees
    findings = localise([broken], [], tolerances)
    assert [f.kind for f in findings] == ["optimised engine"]
    undecided = dataclasses.replace(twin, undecided=True)
    excused = judge_plain(
        undecided, {"logits": reference.outputs["logits"] * 1.01}, reference, manifest, tolerances
    )
    assert excused.result.passed
    reasons = {k.reason for k in excused.result.checks if k.level == "logits" and not k.judged}
    assert len(reasons) == 1 and "rounding" in reasons.pop()
    assert any(k.level == "logits" and k.judged for k in excused.result.checks)


CORRUPTIONS = {
    "doubled": lambda x: 2 * x,
    "zeroed": np.zeros_like,
    "reversed": lambda x: x[::-1].copy(),
    "one token from its neighbour": lambda x: np.where(
        np.arange(len(x))[:, None] == 4, np.roll(x, 1, axis=0), x
    ),
    "one element off": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 70, x + 0.01, x),
    "NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 70, np.nan, x),
}


@pytest.mark.parametrize("field", ["hidden", "output", "logits", "weights"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_corrupted_layer_value_is_rejected_and_placed(judged: Any, field: str, name: str) -> None:
    case, reference, manifest = judged
    tolerances = default_tolerances("float32", ["logits"])
    layer = reference.layers[1]
    bad = CORRUPTIONS[name](getattr(layer, field)).astype(np.float32)
    assert not np.array_equal(bad, getattr(layer, field), equal_nan=False)
    engine = TracedRun(reference.outputs, (reference.layers[0], dataclasses.replace(layer, **{field: bad})))
    run = judge(case, "free", engine, reference, manifest, tolerances)
    if field == "weights" and name == "one element off":
        assert bad.shape == (39, 2)
    assert not run.result.passed
    finding = localise([run], [], tolerances)[0]
    assert finding.layer == 1, finding.message
    expected = {
        "hidden": {"before the MoE", "not a number"},
        "output": {"wrong expert", "dropped token", "not a number"},
        "logits": {"wrong router", "not a number"},
        "weights": {"wrong router weights", "dropped token", "not a number"},
    }
    assert finding.kind in expected[field], finding.message


@pytest.mark.parametrize("field", ["hidden", "output", "weights", "expert_ids"])
def test_a_wrong_shape_is_named(judged: Any, field: str) -> None:
    case, reference, manifest = judged
    tolerances = default_tolerances("float32", ["logits"])
    layer = reference.layers[0]
    short = dataclasses.replace(layer, **{field: getattr(layer, field)[:, :1]})
    run = judge(
        case,
        "free",
        TracedRun(reference.outputs, (short, reference.layers[1])),
        reference,
        manifest,
        tolerances,
    )
    finding = localise([run], [], tolerances)[0]
    assert finding.kind == "shape" and field in finding.message and "[39, 1]" in finding.message


def test_folding_keeps_every_failure_and_the_worst_of_the_rest() -> None:
    def check(
        level: str, subject: str, value: float | None, *, passed: bool = True, judged: bool = True
    ) -> Check:
        return Check(level, subject, value, 1.0, passed, "because", judged, f"at {subject}")

    checks = [
        check("a", "0", 0.1),
        check("a", "1", 0.7),
        check("a", "2", 0.3),
        check("b", "0", 0.1),
        check("b", "1", 2.0, passed=False),
        check("b", "2", None, passed=False),
        check("c", "0", 5.0, passed=False, judged=False),
        check("c", "1", 9.0, passed=False, judged=False),
        check("d", "0", 0.5),
        check("d", "1", 3.0, passed=False, judged=False),
    ]
    kept = [(c.level, c.subject) for c in fold(checks)]
    assert kept == [("a", "1"), ("b", "1"), ("b", "2"), ("c", "1"), ("d", "0"), ("d", "1")]
    assert fold(checks)[0].detail == "worst of 3: at 1"


def test_report_survives_json(failing: ParityReport) -> None:
    data = json.loads(json.dumps(failing.to_dict(), allow_nan=False))
    assert ParityReport.from_dict(data) == failing
    with pytest.raises(UsageError, match="schema version 99"):
        ParityReport.from_dict({**data, "schema_version": 99})
    with pytest.raises(UsageError, match="unknown field 'extra'"):
        ParityReport.from_dict({**data, "extra": 1})
    with pytest.raises(UsageError, match="cases"):
        ParityReport.from_dict({**data, "cases": "none"})
    with pytest.raises(UsageError, match="schema version None"):
        ParityReport.from_dict([])  # type: ignore[arg-type]


def test_written_reports(failing: ParityReport, tmp_path: Path) -> None:
    paths = write_reports(failing, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "parity.json",
        "parity.junit.xml",
        "parity.md",
    ]
    data = json.loads(paths["parity.json"].read_text())
    assert data["passed"] is False and data["summary"]["first_divergence"]

    root = ElementTree.parse(paths["parity.junit.xml"]).getroot()
    failures = root.findall("./testsuite/testcase/failure")
    levels = [(c.name, c.mode, k.level) for c in failing.cases for k in c.checks]
    broken = {(c.name, c.mode, k.level) for c in failing.cases for k in c.failures}
    assert int(root.get("tests", "0")) == len(set(levels)) + len(failing.findings)
    assert len(failures) == int(root.get("failures", "0")) == len(broken) + len(failing.findings)
    weights = next(f for f in failures if f.get("type") == "moe.weights")
    text = weights.text or ""
    assert "batch" in text and "reference" in text and "limit 0.0001" in text and "summation" in text
    names = [(t.get("classname"), t.get("name")) for t in root.iter("testcase")]
    assert len(names) == len(set(names)), "CI tools merge tests of equal names"

    markdown = paths["parity.md"].read_text()
    assert markdown.startswith("# Parity: FAILED") and "not renormalised" in markdown
    assert "## Failing checks" in markdown and "moe.weights" in markdown and "## Limits" in markdown
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_reports(failing, tmp_path / "file" / "sub")


def test_reports_of_hostile_names_stay_well_formed(failing: ParityReport, tmp_path: Path) -> None:
    nasty = "a|b\n<script>\x00 ]]> & \ud800"
    case = dataclasses.replace(failing.cases[0], name=nasty, description=nasty, error=nasty)
    report = dataclasses.replace(failing, cases=(case,), notes=(nasty,))
    from moe_export.report.junit import parity_junit
    from moe_export.report.markdown import parity_markdown

    assert ElementTree.fromstring(parity_junit(report)).tag == "testsuites"
    rows = [line for line in parity_markdown(report).splitlines() if line.startswith("| a")]
    assert rows and all(r.count("|") - r.count("\\|") == 9 for r in rows if "free" in r)
    assert "<script>" not in parity_markdown(report)


def test_passing_report_in_markdown(bundle: Path, tmp_path: Path) -> None:
    report = verify_bundle(bundle, against=TinyReference(), threads=1)
    text = write_reports(report, tmp_path)["parity.md"].read_text()
    assert text.startswith("# Parity: PASSED") and "Failing" not in text and "4 of 4" in text


def test_progress_is_told(bundle: Path) -> None:
    from contextlib import contextmanager

    seen: list[Any] = []

    class Watch:
        @contextmanager
        def stage(self, name: str, total: int | None = None) -> Any:
            seen.append((name, total))
            yield seen.append

        def note(self, text: str) -> None:
            seen.append(text)

    report = verify_bundle(bundle, against=TinyReference(), threads=1, progress=Watch())
    stages = dict(s for s in seen if isinstance(s, tuple))
    assert stages["verify"] == len(report.cases) == seen.count(1)


def test_importing_verify_needs_nothing_heavy() -> None:
    code = (
        "import sys, moe_export.verify\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_low_precision_weights_of_the_right_engine_are_covered(tmp_path: Path) -> None:
    low = engines.bfloat16_weights(TinyWeights.make())
    report = verify_bundle(
        engines.bundle_of(tmp_path / "b", low, dtype="bfloat16"), against=TinyReference(), threads=1
    )
    assert all(c.weight_tokens > 0.5 * c.routed_tokens for c in report.coverage)
