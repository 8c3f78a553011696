"""The routing heatmap: one row per MoE layer, one cell per expert, as SVG that follows the page's colours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .content import UsageData

WIDE, GAP = 990, 2
LEFT, TOP = 64, 36
FAINTEST_TOP = 2.0
"""The strongest colour stands for the largest load found, and at least for so many times the balanced one."""


@dataclass(frozen=True)
class Cell:
    """One expert of one layer. ``level``: 0 (never chosen) to 1 (strongest colour); ``title``: the
    tooltip."""

    x: float
    y: float
    level: float
    title: str
    label: str


@dataclass(frozen=True)
class Row:
    """One layer: its label and its cells."""

    label: str
    y: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Heatmap:
    """Geometry and cells; sizes in SVG user units. ``ticks``: (x, expert number)."""

    left: float
    top: float
    width: float
    height: float
    cell_width: float
    cell_height: float
    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, int], ...]
    strongest: float


def make_heatmap(usage: UsageData) -> Heatmap:
    """Lay out the cells. Colour tells the load relative to a balanced one, so layers of other widths
    compare."""
    widest = max(len(layer.counts) for layer in usage.layers)
    cell_width = max(6.0, min(110.0, (WIDE - LEFT) / widest))
    cell_height = 30.0 if len(usage.layers) <= 24 else 14.0
    loads = [max(layer.counts) * len(layer.counts) / max(sum(layer.counts), 1) for layer in usage.layers]
    strongest = max(FAINTEST_TOP, math.ceil(max(loads) * 2) / 2)
    rows = []
    for row, layer in enumerate(usage.layers):
        y = TOP + row * cell_height
        cells = []
        for expert in range(len(layer.counts)):
            share = layer.share(expert)
            load = share * len(layer.counts)
            cells.append(
                Cell(
                    x=LEFT + expert * cell_width,
                    y=y,
                    level=round(load / strongest, 3),
                    title=f"layer {layer.index}, expert {expert}: {layer.counts[expert]:,} choices, "
                    f"{share:.1%} of the layer, {load:.2f} times the balanced load",
                    label=f"{share * 100:.0f}" if cell_width >= 30 and cell_height >= 20 else "",
                )
            )
        rows.append(Row(str(layer.index), y, tuple(cells)))
    step = max(1, -(-24 // int(cell_width)))
    return Heatmap(
        left=LEFT,
        top=TOP,
        width=LEFT + widest * cell_width + GAP,
        height=TOP + len(usage.layers) * cell_height + GAP,
        cell_width=cell_width - GAP,
        cell_height=cell_height - GAP,
        rows=tuple(rows),
        ticks=tuple((LEFT + (i + 0.5) * cell_width - GAP / 2, i) for i in range(0, widest, step)),
        strongest=strongest,
    )
