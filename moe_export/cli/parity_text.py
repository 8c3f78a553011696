"""A parity report as text for a terminal or a log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_export.cli.output import table
from moe_export.verify.result import SIMULATED

if TYPE_CHECKING:
    from moe_export.verify.result import CaseResult, Check, ParityReport

MOST_FAILURES = 8
"""Failed checks that are printed; the rest is counted. JSON and JUnit have them all."""


def parity_text(report: ParityReport) -> str:
    """Cases, the first divergence, failed checks with their coordinates, notes, and the verdict last."""
    lines = [f"{SIMULATED}\n"] if report.simulated else []
    lines.append(_cases(report))
    if report.findings:
        lines.append("")
        lines += [f"first divergence: {f.message}" for f in report.findings]
    failures = [(case, check) for case in report.cases for check in case.failures]
    lines += [f"{case.name} ({case.mode}): {case.error}" for case in report.cases if case.error]
    lines += [_failure(case, check) for case, check in failures[:MOST_FAILURES]]
    if len(failures) > MOST_FAILURES:
        lines.append(f"and {len(failures) - MOST_FAILURES} more failed checks")
    lines += [f"note: {note}" for note in report.notes]
    lines += ["", _verdict(report)]
    return "\n".join(lines)


def _cases(report: ParityReport) -> str:
    headers = ("case", "routing", "result", "max error", "same experts", "near ties", "seconds")
    rows = []
    for case in report.cases:
        errors = [e.max_abs for e in case.outputs.values() if e.max_abs is not None]
        routing = [layer.routing for layer in case.layers if layer.routing is not None]
        tokens = sum(r.tokens for r in routing)
        same = f"{100 * sum(r.same_sets for r in routing) / tokens:.2f} %" if tokens else ""
        rows.append(
            (
                case.name,
                case.mode,
                "ok" if case.passed else "FAILED",
                f"{max(errors):.1e}" if errors else "",
                same,
                str(sum(r.near_ties for r in routing)) if tokens else "",
                f"{case.seconds:.2f}",
            )
        )
    return table(headers, rows)


def _failure(case: CaseResult, check: Check) -> str:
    value = "not a number" if check.value is None else f"{check.value:.3g}"
    detail = f"; {check.detail}" if check.detail else ""
    subject = "" if check.subject == check.level else f" of {check.subject}"
    return f"{case.name} ({case.mode}): {check.level}{subject} is {value}, limit {check.limit:.3g}{detail}"


def _verdict(report: ParityReport) -> str:
    summary: dict[str, Any] = report.summary()
    source = f"{report.against} {report.source}".strip()
    how = f"{SIMULATED}: " if report.simulated else ""
    if not report.passed:
        failed = summary["failed_cases"]
        return f"{how}NOT VERIFIED against {source}: {failed} of {summary['cases']} cases failed"
    error = summary["relative_error"]
    parts = [f"{summary['cases']} cases"]
    if summary["quantization"] is not None and summary["forced_error"] is not None:
        parts.append(f"largest relative error with routing forced {summary['forced_error']:.1e}")
    elif error is not None:
        parts.append(f"largest relative error {error:.1e}")
    if summary["route_agreement"] is not None:
        agreement = 100 * summary["route_agreement"]
        parts.append(f"the same experts for {agreement:.2f} % of {summary['routed_tokens']} routed tokens")
    if summary["quantization"] is not None and summary["cross_entropy_change"] is not None:
        parts.append(f"cross-entropy on text changed by at most {summary['cross_entropy_change']:.4f} nats")
    return f"{how}verified against {source}: {', '.join(parts)}"
