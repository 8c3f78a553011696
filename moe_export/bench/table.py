"""A benchmark as plain text for a terminal or a log (also valid Markdown)."""

from __future__ import annotations

from collections.abc import Sequence

from .result import ENGINE, BenchReport, Row, Skipped, workload_text


def format_table(report: BenchReport) -> str:
    """Contestants, times per workload, speed-ups, what was skipped and why, and the machine."""
    parts = [_machine(report), _contestants(report), _times(report), _speedups(report)]
    if report.slower():
        parts.append(
            "The engine is SLOWER than the best alternative:\n" + "\n".join(f"- {s}" for s in report.slower())
        )
    if report.skipped:
        lines = [f"- {name}: {reason}" for name, reason in group_skipped(report.skipped)]
        parts.append("Not measured:\n" + "\n".join(lines))
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts)


def group_skipped(skipped: Sequence[Skipped]) -> list[tuple[str, str]]:
    """(who, reason), with the workloads that share contestant and reason in one entry."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item in skipped:
        groups.setdefault((item.contestant, item.reason), []).append(item.workload)
    return [
        (f"{name} ({', '.join(workloads)})" if any(workloads) else name, reason)
        for (name, reason), workloads in groups.items()
    ]


def _machine(report: BenchReport) -> str:
    m = report.machine
    load = "unknown" if m.foreign_cores is None else f"{m.foreign_cores:.2f} cores"
    noisy = "  **noisy: repeat on a quiet machine**" if m.noisy else ""
    return (
        f"{report.bundle}: {report.target}, {report.dtype}, {m.threads} thread(s) each\n"
        f"{m.cpu}, {m.cores_usable} usable core(s); other processes used {load}{noisy}"
    )


def _contestants(report: BenchReport) -> str:
    rows = []
    for c in report.contestants:
        state = {True: "yes", False: "WRONG NUMBERS", None: "not judged"}[c.sanity.ok]
        error = "" if c.sanity.max_error is None else f"{c.sanity.max_error:.1e}"
        rows.append([
            c.name, state, error, _seconds(c.prepare_s), _seconds(c.load_s), _seconds(c.first_run_s),
            "" if c.peak_rss is None else f"{c.peak_rss / 2**20:.0f}",
        ])  # fmt: skip
    headers = ["contestant", "agrees", "max error", "prepare s", "load s", "first run s", "peak RSS MiB"]
    return markdown_table(headers, rows)


def _times(report: BenchReport) -> str:
    rows = [
        [
            workload_text(r), r.contestant, f"{r.p50_ms:.2f}", f"{r.p95_ms:.2f}", f"{r.p99_ms:.2f}",
            str(r.samples), f"{r.tokens_per_s:.0f}", _imbalance(r), "noisy" if r.noisy else "",
        ]
        for r in report.rows
    ]  # fmt: skip
    headers = ["workload", "contestant", "p50 ms", "p95 ms", "p99 ms", "n", "tokens/s", "max/mean load", ""]
    return markdown_table(headers, rows)


def _speedups(report: BenchReport) -> str:
    rows = [
        [
            workload_text(r),
            f"{r.engine_ms:.2f}",
            _times_text(r.vs_eager),
            _times_text(r.vs_best),
            r.best or "none",
        ]
        for r in report.ratios
    ]
    return markdown_table([f"{ENGINE} against", "p50 ms", "eager", "best other", "which is"], rows)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned for the eye."""
    cells = [[c.replace("|", "\\|") for c in line] for line in [list(headers), *rows]]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(cells[0]), rule, *(line(c) for c in cells[1:])])


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _times_text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _imbalance(row: Row) -> str:
    return "" if row.imbalance is None else f"{row.imbalance:.2f}"
