"""JUnit XML, as CI systems read it: one suite per case, one test per level."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ..verify.result import SIMULATED

if TYPE_CHECKING:
    from ..verify.result import CaseResult, Check, ParityReport

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parity_junit(report: ParityReport) -> bytes:
    """The report as UTF-8 XML. Checks that only inform are ``skipped`` with their reason."""
    how = f" ({SIMULATED})" if report.simulated else ""
    root = ElementTree.Element("testsuites", name=f"moe-export verify{how}", time=f"{report.seconds:.3f}")
    for case in report.cases:
        root.append(_case(case, report))
    if report.findings:
        root.append(_findings(report))
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def check_text(check: Check) -> str:
    """One check in words: value, limit, coordinates, reason."""
    value = "not a number" if check.value is None else f"{check.value:.6g}"
    detail = f"; {check.detail}" if check.detail else ""
    return f"{check.level} of {check.subject}: {value}, limit {check.limit:g}{detail} (limit: {check.reason})"


def _case(case: CaseResult, report: ParityReport) -> ElementTree.Element:
    name = f"{case.name} ({case.mode} routing)" if case.mode == "forced" else case.name
    suite = ElementTree.Element(
        "testsuite", name=_clean(name), time=f"{case.seconds:.3f}", timestamp=report.created
    )
    properties = ElementTree.SubElement(suite, "properties")
    facts = {
        "description": case.description,
        "mode": case.mode,
        "seed": case.seed,
        "chunks": list(case.chunks) or None,
        "inputs": {k: list(v) for k, v in case.inputs.items()},
        "dtype": report.dtype,
        "target": report.target,
        "against": f"{report.against} {report.source}",
        "source_hash": report.source_hash,
    }
    for key, value in facts.items():
        if value is not None:
            ElementTree.SubElement(properties, "property", name=key, value=_clean(str(value)))
    class_name = _clean(f"parity.{name}")
    if case.error:
        test = ElementTree.SubElement(suite, "testcase", classname=class_name, name="run", time="0")
        ElementTree.SubElement(test, "error", message=_clean(case.error), type="error").text = _clean(
            case.error
        )
    for level in dict.fromkeys(c.level for c in case.checks):
        checks = [c for c in case.checks if c.level == level]
        test = ElementTree.SubElement(suite, "testcase", classname=class_name, name=_clean(level), time="0")
        failing = [check_text(c) for c in checks if c.judged and not c.passed]
        if failing:
            failure = ElementTree.SubElement(test, "failure", message=_clean(failing[0]), type=level)
            failure.text = _clean("\n".join(failing))
        elif not any(c.judged for c in checks):
            ElementTree.SubElement(test, "skipped", message=_clean(f"not judged: {checks[0].reason}"))
    _count(suite)
    return suite


def _findings(report: ParityReport) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name="first divergence", time="0", timestamp=report.created)
    for finding in report.findings:
        test = ElementTree.SubElement(
            suite, "testcase", classname="parity.first divergence", name=_clean(finding.kind), time="0"
        )
        cases = f"\nshown by: {', '.join(finding.cases)}" if finding.cases else ""
        failure = ElementTree.SubElement(test, "failure", message=_clean(finding.message), type=finding.kind)
        failure.text = _clean(finding.message + cases)
    _count(suite)
    return suite


def _count(suite: ElementTree.Element) -> None:
    for count, tag in (
        ("tests", "testcase"),
        ("failures", "failure"),
        ("errors", "error"),
        ("skipped", "skipped"),
    ):
        suite.set(count, str(sum(1 for _ in suite.iter(tag))))


def _clean(text: str) -> str:
    """Without the characters XML cannot hold."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
