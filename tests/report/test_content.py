"""The content of a report: JSON, parts that are missing or damaged, writing into a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_export.bundle.reader import Bundle, open_bundle
from moe_export.errors import BundleError, UsageError
from moe_export.report.content import group_decisions, make_report, summary
from moe_export.report.html import read_part, render_html, report_files, write_report
from moe_export.report.json import render_json
from moe_export.schema import from_json
from tests.report.pages import Page
from tests.report.samples import DECISIONS, make_bundle, make_usage

Parts = dict[str, Any]


@pytest.fixture(scope="session")
def parts(parity: Parts, bench: Parts, usage: Parts) -> dict[str, Parts]:
    return {"parity": parity, "bench": bench, "usage": usage}


def test_json_holds_every_part_whole(bundle: Bundle, parts: dict[str, Parts]) -> None:
    data = json.loads(render_json(bundle, **parts))
    assert data["schema_version"] == 1 and data["bundle"] == "tiny"
    assert data["parity"] == json.loads(json.dumps(parts["parity"]))
    assert data["bench"] == json.loads(json.dumps(parts["bench"]))
    assert [x["counts"] for x in data["routing"]["layers"]] == [x["counts"] for x in parts["usage"]["layers"]]
    assert len(data["decisions"]) == len(DECISIONS)
    assert from_json(type(bundle.manifest), data["manifest"]) == bundle.manifest


def test_html_and_json_say_the_same(bundle: Bundle, parts: dict[str, Parts]) -> None:
    files = report_files(bundle, **parts)
    assert set(files) == {"report.html", "report.json"}
    data, page = json.loads(files["report.json"]), Page(files["report.html"].decode())
    numbers = data["summary"]
    assert numbers["verdict"] == "passed" and "passed" in page.text
    assert f"{numbers['speedup']['vs_eager']['prefill']:.2f}×" in page.text
    assert f"{numbers['speedup']['vs_best']['decode']:.2f}×" in page.text
    for decision in data["decisions"]:
        assert decision["reason"] in page.text
    for case in data["parity"]["cases"]:
        assert case["name"] in page.text
    for skipped in data["bench"]["skipped"]:
        assert skipped["reason"] in page.text
    for layer in data["manifest"]["moe_layers"]:
        assert layer["name"] in page.text
    assert page.headings[0] == numbers["model"]


def test_the_summary_of_an_engine(bundle: Bundle, parts: dict[str, Parts]) -> None:
    found = summary(make_report(bundle, **parts))
    assert (found["target"], found["dtype"], found["moe_layers"]) == ("onnxruntime", "float32", 2)
    assert (found["experts"], found["top_k"]) == ([4], [2])
    assert found["size_bytes"] == sum(f.size for f in bundle.manifest.files)
    assert found["parameters"]["total"] > found["parameters"]["active"]


def test_nothing_done_is_said(bundle: Bundle) -> None:
    data = json.loads(render_json(bundle))
    assert data["summary"]["verdict"] == "not verified"
    assert data["parity"] is data["bench"] is data["routing"] is None
    page = Page(render_html(bundle))
    assert "Not verified" in page.text and "Not measured" in page.text and "was not traced" in page.text
    assert "passed" not in page.text
    assert page.with_class("cell") == []


def test_a_failed_verification_is_at_the_top(bundle: Bundle, failed_parity: Parts) -> None:
    page = Page(render_html(bundle, parity=failed_parity))
    assert "does not compute what its source computes" in page.text
    message = failed_parity["findings"][0]["message"]
    assert page.text.index(message) < page.text.index("Routing How") if "Routing How" in page.text else True
    assert page.text.count(message) == 2
    assert "wrong expert" in page.text


def test_equal_decisions_stand_together(bundle: Bundle) -> None:
    groups = group_decisions(DECISIONS)
    assert [subjects for subjects, _ in groups] == [["layers.0.moe", "layers.1.moe"], ["attention"]]
    text = Page(render_html(bundle)).text
    assert "layers.0.moe, layers.1.moe" in text
    assert "not loop : slower here" in text.replace("loop:", "loop :")


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("bench", {"schema_version": 99}, "benchmark report: schema version 99"),
        ("parity", {"schema_version": 99}, "parity report: schema version 99"),
        ("bench", {"rows": 3}, "rows"),
        ("usage", {"layers": None}, "usage: expected"),
        ("usage", {"tokens": "many"}, "usage.tokens"),
        ("usage", {"layers": [{"index": 0}]}, "missing field 'name'"),
        ("usage", {"layers": [3]}, "a layer is int"),
    ],
)
def test_damaged_parts_are_refused(
    bundle: Bundle, parts: dict[str, Parts], name: str, damage: Parts, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        render_html(bundle, **{name: {**parts[name], **damage}})


def test_negative_counts_are_refused(bundle: Bundle) -> None:
    usage = make_usage()
    usage["layers"][1]["counts"][0] = -1
    with pytest.raises(UsageError, match="layer 1 has no counts of 0 or more"):
        render_html(bundle, usage=usage)


def test_writing_into_a_bundle_keeps_it_sound(tmp_path: Path, parts: dict[str, Parts]) -> None:
    folder = make_bundle(tmp_path / "engine").path
    html, data = write_report(folder, **parts)
    assert html == folder / "evidence" / "report.html" and data.name == "report.json"
    listed = {f.path for f in open_bundle(folder).manifest.files}
    assert {"evidence/report.html", "evidence/report.json"} <= listed
    assert "passed" in html.read_text(encoding="utf-8")
    # Again, from what lies in the bundle.
    (folder / "evidence" / "bench.json").write_text(json.dumps(parts["bench"]), encoding="utf-8")
    html, _ = write_report(folder, parity=parts["parity"])
    page = Page(html.read_text(encoding="utf-8"))
    assert "transformers-onnx-fused" in page.text
    assert page.with_class("cell") == []
    open_bundle(folder)


def test_evidence_that_is_not_json_is_named(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    assert read_part(tmp_path, "bench") is None
    (evidence / "bench.json").write_text("{", encoding="utf-8")
    with pytest.raises(BundleError, match=r"bench\.json cannot be read as JSON"):
        read_part(tmp_path, "bench")
    (evidence / "bench.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BundleError, match="expected a JSON object, got list"):
        read_part(tmp_path, "bench")


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        render_html(tmp_path)
