"""A parity report in Markdown: verdict, first divergence, cases, failing checks, layers, limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..verify.result import SIMULATED

if TYPE_CHECKING:
    from ..verify.agreement import RoutingAgreement
    from ..verify.result import CaseResult, Check, ParityReport

MOST_ROWS = 50
"""At most so many failing checks are listed; the JSON report has all."""


def parity_markdown(report: ParityReport) -> str:
    """The whole report as one Markdown document."""
    parts = [_head(report), _findings(report), _cases(report), _failures(report), _layers(report)]
    parts += [_limits(report), _notes(report)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _head(report: ParityReport) -> str:
    verdict = "PASSED" if report.passed else "FAILED"
    summary = report.summary()
    rows = [
        ("engine", f"`{report.bundle}`, {report.target}, {_format(report)}"),
        ("compared with", f"{report.against} `{report.source}`, source hash `{report.source_hash[:16]}`"),
        ("cases", f"{summary['cases']}, of them failed: {summary['failed_cases']}"),
        ("largest error", _number(summary["max_error"])),
        ("relative to the largest output", _number(summary["relative_error"])),
        ("the same with routing forced", _number(summary["forced_error"])),
        (
            "same experts",
            _agreement(summary["route_agreement"], summary["routed_tokens"], summary["near_ties"]),
        ),
        ("KL divergence (mean, worst case)", _number(summary["kl_mean"])),
        ("cross-entropy change on text", _number(summary["cross_entropy_change"])),
        ("seed", str(report.seed)),
        ("made", f"{report.created}, {report.seconds:.1f} s"),
    ]
    how = f" ({SIMULATED})" if report.simulated else ""
    return f"# Parity{how}: {verdict}\n\n" + _table(("", ""), rows)


def _format(report: ParityReport) -> str:
    return report.dtype if report.quantization is None else f"{report.dtype}, experts {report.quantization}"


def _agreement(part: float | None, tokens: int, ties: int) -> str:
    return "no MoE layers" if part is None else f"{part:.4%} of {tokens} token choices, {ties} near ties"


def _findings(report: ParityReport) -> str:
    if not report.findings:
        return ""
    lines = [f"- **{f.kind}**: {_line(f.message)}" + _shown_by(f.cases) for f in report.findings]
    return "## First divergence\n\n" + "\n".join(lines)


def _shown_by(cases: Sequence[str]) -> str:
    return f" (shown by: {', '.join(cases)})" if cases else ""


def _cases(report: ParityReport) -> str:
    rows = []
    for case in report.cases:
        routing = [layer.routing for layer in case.layers if layer.routing is not None]
        rows.append(
            (
                case.name,
                case.mode,
                case.description,
                "passed" if case.passed else "**failed**",
                _worst_output(case),
                _number(case.logits.kl_mean if case.logits is not None else None),
                _routing(routing, case),
                _seed(case),
            )
        )
    headers = ("case", "routing", "input", "result", "largest error", "KL", "same experts", "seed")
    return "## Cases\n\n" + _table(headers, rows)


def _worst_output(case: CaseResult) -> str:
    errors = [e.max_abs for e in case.outputs.values() if e.max_abs is not None]
    return _number(max(errors, default=None))


def _routing(layers: Sequence[RoutingAgreement], case: CaseResult) -> str:
    tokens = sum(r.tokens for r in layers)
    if not tokens or case.mode == "forced":
        return "forced" if tokens else ""
    same, ties = sum(r.same_sets for r in layers), sum(r.near_ties for r in layers)
    return f"{same} of {tokens}" + (f", {ties} near ties" if ties else "")


def _seed(case: CaseResult) -> str:
    return "" if case.seed is None else str(case.seed)


def _failures(report: ParityReport) -> str:
    failing: list[tuple[CaseResult, Check]] = [(c, k) for c in report.cases for k in c.failures]
    errors = [c for c in report.cases if c.error]
    if not failing and not errors:
        return ""
    rows: list[tuple[str, ...]] = [(_mode(c), "run", "", "", "", c.error, "") for c in errors]
    rows += [
        (
            _mode(c),
            k.level,
            k.subject,
            "not a number" if k.value is None else _number(k.value),
            f"{k.limit:g}",
            k.detail,
            k.reason,
        )
        for c, k in failing[:MOST_ROWS]
    ]
    more = (
        f"\n\n{len(failing) - MOST_ROWS} more failing checks are in parity.json."
        if len(failing) > MOST_ROWS
        else ""
    )
    headers = ("case", "level", "of", "value", "limit", "where", "why this limit")
    return "## Failing checks\n\n" + _table(headers, rows) + more


def _mode(case: CaseResult) -> str:
    return case.name if case.mode == "free" else f"{case.name} ({case.mode})"


def _layers(report: ParityReport) -> str:
    rows = []
    for covered in report.coverage:
        mine = [(c, r) for c in report.cases for r in c.layers if r.index == covered.index]
        free = [r.routing for c, r in mine if c.mode == "free" and r.routing is not None]
        inputs = [r.hidden.max for _, r in mine if r.hidden is not None and r.hidden.max is not None]
        outputs = [r.output.max for _, r in mine if r.output is not None and r.output.max is not None]
        weights = [a.weight_max for a in free if a.weight_max is not None]
        tokens = sum(a.tokens for a in free)
        reached = covered.num_experts - len(covered.unused_experts)
        rows.append(
            (
                str(covered.index),
                covered.name,
                _number(max(inputs, default=None)),
                _number(max(outputs, default=None)),
                _number(max(weights, default=None)),
                f"{sum(a.same_sets for a in free)} of {tokens}",
                str(sum(a.near_ties for a in free)),
                str(sum(a.after_ties for a in free)),
                str(sum(a.unexplained for a in free)),
                f"{reached} of {covered.num_experts}",
            )
        )
    headers = (
        "layer",
        "name",
        "input error",
        "output error",
        "weight error",
        "same experts",
        "near ties",
        "after a tie",
        "unexplained",
        "experts reached",
    )
    if not rows:
        return ""
    return "## MoE layers\n\nLargest errors over all cases, each relative to the token.\n\n" + _table(
        headers, rows
    )


def _limits(report: ParityReport) -> str:
    rows = [(f"`{t.name}`", f"{t.value:g}", t.measures, t.reason) for t in report.tolerances]
    return "## Limits\n\n" + _table(("name", "limit", "measures", "why"), rows)


def _notes(report: ParityReport) -> str:
    lines = [f"- {_line(n)}" for n in report.notes]
    lines.append("- tools: " + ", ".join(f"{k} {v}" for k, v in report.tools.items()))
    return "## Notes\n\n" + "\n".join(lines)


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
