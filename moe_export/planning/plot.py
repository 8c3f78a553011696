"""The plot of a plan: decode tokens/s against batch, beside dense models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_export.errors import UsageError
from moe_export.inspect.usage import check_plot_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_export.planning.plan import Plan


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Draw predicted decode tokens/s over batch sizes into a .png or .svg file.

    Raises:
        UsageError: another ending, or the file cannot be written.
    """
    path = check_plot_path(path)
    try:
        _figure(plan).savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"{path}: the plot cannot be written: {error.strerror}") from error


def _figure(plan: Plan) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")  # drawn without pyplot, so without any display
    axes = figure.subplots()
    lines = [("model", plan.model.name)]
    if plan.dense:
        lines += [("dense_active", "dense, same active size"), ("dense_total", "dense, same total size")]
    for (name, label), style in zip(lines, ("o-", "s--", "^:"), strict=False):
        points = [(p.batch, getattr(p, name)) for p in plan.sweep if getattr(p, name) is not None]
        if points:
            axes.plot([b for b, _ in points], [rate for _, rate in points], style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axvline(plan.load.batch, color="0.7", linewidth=1)
    axes.set_xlabel(f"sequences of {plan.load.context} tokens at a time")
    axes.set_ylabel("decoded tokens/s")
    axes.set_title(f"predicted: {plan.gpus} x {plan.gpu.title}, weights in {plan.load.weights.name}")
    axes.grid(True, which="major", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure
