"""Speed plots as SVG text for the page, in the page's own colours (CSS variables), for dark and light."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..bench.result import ENGINE, BenchReport, Ratio, Row, workload_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT = "#010203", "#010204"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05")
_VARIABLES = {_INK: "var(--ink-2)", _FAINT: "var(--line)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)
}
"""Colours that matplotlib writes, and what the page shows in their place."""
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_NAMESPACE = re.compile(r'\sxmlns(:\w+)?="[^"]*"')


def speed_plots(bench: BenchReport) -> list[tuple[str, str, str]]:
    """(title, what it shows, SVG) of every plot that the measurements allow."""
    plots = []
    names = [c.name for c in bench.contestants]
    others = [n for n in names if n != ENGINE]
    rows = {(workload_text(r), r.contestant): r for r in bench.rows}
    measured = [r for r in bench.ratios if (workload_text(r), ENGINE) in rows]
    real = [r for r in measured if r.routing == "real"]
    if real and others:
        plots.append((
            "Time relative to the engine",
            "Median time of each alternative over the engine's, per workload. Above 1 the engine is faster.",
            _draw(lambda: _relative(real, rows, others, names)),
        ))  # fmt: skip
    if real:
        plots.append((
            "Latency",
            "Dot: median. Line: from the fastest run to the 95th percentile.",
            _draw(lambda: _latency(real, rows, names)),
        ))  # fmt: skip
    skewed = [r for r in measured if r.routing != "real"]
    if skewed:
        plots.append((
            "Routing skew",
            "Median time for the same tokens, the experts' load forced from balanced to all on the same.",
            _draw(lambda: _skew(measured, skewed, rows, names)),
        ))  # fmt: skip
    return plots


def _relative(
    ratios: Sequence[Ratio], rows: dict[tuple[str, str], Row], others: Sequence[str], names: Sequence[str]
) -> Figure:
    figure, axes = _figure(len(ratios) * (len(others) * 0.24 + 0.3) + 0.9)
    labels = [workload_text(r) for r in ratios]
    for offset, name in _offsets(others):
        values = [
            rows[label, name].p50_ms / r.engine_ms if (label, name) in rows else 0.0
            for label, r in zip(labels, ratios, strict=True)
        ]
        bars = _bars(axes, offset, values, len(others), name, names)
        axes.bar_label(bars, [f"{v:.2f}" if v else "" for v in values], padding=3, color=_INK, fontsize=8)
    axes.axvline(1.0, color=_SERIES[0], linewidth=1.6, label=ENGINE)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    _categories(axes, labels, "times the engine's time")
    _legend(axes)
    return figure


def _latency(ratios: Sequence[Ratio], rows: dict[tuple[str, str], Row], names: Sequence[str]) -> Figure:
    figure, axes = _figure(len(ratios) * (len(names) * 0.24 + 0.3) + 0.9)
    labels = [workload_text(r) for r in ratios]
    for offset, name in _offsets(names):
        colour = _colour(name, names)
        found = [(i + offset, rows[key, name]) for i, key in enumerate(labels) if (key, name) in rows]
        for place, row in found:
            axes.plot([row.min_ms, row.p95_ms], [place, place], color=colour, linewidth=2.0, alpha=0.55)
        places = [place for place, _ in found]
        axes.plot([row.p50_ms for _, row in found], places, "o", color=colour, markersize=6, label=name)
    axes.set_xscale("log")
    axes.tick_params(which="minor", length=0, labelsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    _categories(axes, labels, "milliseconds, logarithmic")
    _legend(axes)
    return figure


def _skew(
    ratios: Sequence[Ratio], skewed: Sequence[Ratio], rows: dict[tuple[str, str], Row], names: Sequence[str]
) -> Figure:
    cells = sorted({(r.phase, r.batch, r.sequence) for r in skewed})
    kept = [r for r in ratios if (r.phase, r.batch, r.sequence) in cells]
    loads = {id(r): rows[workload_text(r), ENGINE].imbalance for r in kept}
    kept.sort(key=lambda r: (r.phase, r.batch, r.sequence, loads[id(r)] or 0.0))
    shown = [n for n in names if any((workload_text(r), n) in rows for r in skewed)]
    figure, axes = _figure(len(kept) * (len(shown) * 0.24 + 0.3) + 0.9)
    keys = [workload_text(r) for r in kept]
    for offset, name in _offsets(shown):
        found = [rows.get((key, name)) for key in keys]
        _bars(
            axes, offset, [row.p50_ms if row is not None else 0.0 for row in found], len(shown), name, names
        )
    labels = []
    for ratio in kept:
        load = loads[id(ratio)]
        text = f"{ratio.phase} {ratio.batch}x{ratio.sequence} {ratio.routing}"
        labels.append(text if load is None else f"{text}\nmax/mean load {load:.2f}")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.02)
    _categories(axes, labels, "milliseconds")
    _legend(axes)
    return figure


def _offsets(names: Sequence[str]) -> Iterator[tuple[float, str]]:
    """Where each contestant's bar lies around its workload's place."""
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        yield (i - (len(names) - 1) / 2) * height, name


def _bars(
    axes: Axes, offset: float, values: Sequence[float], count: int, name: str, names: Sequence[str]
) -> Any:
    places = [i + offset for i in range(len(values))]
    return axes.barh(places, values, height=0.8 / count * 0.86, color=_colour(name, names), label=name)


def _colour(name: str, names: Sequence[str]) -> str:
    """One colour per contestant on all plots; the engine's comes first."""
    return _SERIES[min(list(names).index(name), len(_SERIES) - 1)]


def _categories(axes: Axes, labels: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_xlabel(unit)


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, labelcolor=_INK,
        handlelength=1.0, borderaxespad=0.2,
    )  # fmt: skip


def _figure(height: float) -> tuple[Figure, Axes]:
    # A figure of its own, without pyplot: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, max(height, 1.8)), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", linewidth=0.6)
    return figure, axes


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "moe-export", "text.parse_math": False, "font.size": 9.0,
        "font.family": "sans-serif", "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _FAINT,
        "xtick.color": _INK, "ytick.color": _INK, "grid.color": _FAINT, "axes.facecolor": "none",
        "figure.facecolor": "none", "savefig.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def _draw(make: Any) -> str:
    """SVG of the figure that ``make`` returns, ready to stand inside an HTML page."""
    out = io.StringIO()
    with _style():
        make().savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = _METADATA.sub("", text[text.index("<svg") :])
    # Inside HTML the parser knows the namespaces; without them no address is left in the file.
    text = _NAMESPACE.sub("", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
