"""The page itself: complete, safe against hostile names, heatmap and plots."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moe_export.bench import BenchReport
from moe_export.bundle.reader import Bundle
from moe_export.report.content import UsageData, UsageLayer
from moe_export.report.formats import milliseconds, number, parameters, percent, seconds, size, times
from moe_export.report.heatmap import make_heatmap
from moe_export.report.html import render_html
from moe_export.report.plots import speed_plots
from tests.bench.samples import NAMES, make_bench, row
from tests.report.pages import Page
from tests.report.samples import HOSTILE, QUOTES, hostile_bundle, make_usage

Parts = dict[str, Any]
SECTIONS = ("Summary", "Routing", "Parity", "Speed", "Lowering decisions", "Manifest")


@pytest.fixture(scope="module")
def html(bundle: Bundle, parity: Parts, bench: Parts, usage: Parts) -> str:
    return render_html(bundle, parity=parity, bench=bench, usage=usage)


def test_sections_in_order(html: str) -> None:
    headings = Page(html).headings
    assert [h for h in headings if h in SECTIONS] == list(SECTIONS)


def test_links_of_the_page_lead_to_its_sections(html: str) -> None:
    page = Page(html)
    ids = {a["id"] for _, a in page.elements if "id" in a}
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert len(links) == len(SECTIONS)
    assert all(link.removeprefix("#") in ids for link in links)


def test_nothing_is_loaded_from_anywhere(html: str) -> None:
    page = Page(html)
    outside = [a for a in page.addresses() if not a.startswith(("#", "data:,"))]
    assert outside == []
    assert "url(http" not in html and "@import" not in html and "://" not in html
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    assert all(tag not in ("script", "iframe", "object", "embed", "form") for tag, _ in page.elements)


def test_hostile_names_stay_text(tmp_path: Path, parity: Parts) -> None:
    usage = make_usage()
    usage["layers"][0]["name"] = HOSTILE
    bench = make_bench(bundle=HOSTILE, source=QUOTES, notes=(HOSTILE, QUOTES)).to_dict()
    bench["machine"]["cpu"] = HOSTILE
    bench["skipped"][0]["reason"] = QUOTES
    bench["contestants"][1]["title"] = HOSTILE
    for part in (bench["rows"], bench["contestants"]):
        for item in part:
            for key in ("contestant", "name"):
                if item.get(key) == "transformers-onnx":
                    item[key] = HOSTILE
    parity = {**parity, "notes": [HOSTILE], "source": QUOTES}
    text = render_html(hostile_bundle(tmp_path / "tiny"), parity=parity, bench=bench, usage=usage)
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags and "img" not in tags
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert HOSTILE in page.text and QUOTES in page.text
    # The parser above would have seen it.
    assert {"script", "img"} <= {tag for tag, _ in Page(f"<p>{HOSTILE}<b title={QUOTES}").elements}


def test_one_cell_per_layer_and_expert(html: str, usage: Parts) -> None:
    page = Page(html)
    cells = page.with_class("cell")
    assert len(cells) == sum(len(layer["counts"]) for layer in usage["layers"])
    levels = [float(cell["fill-opacity"]) for cell in cells]
    assert levels[0] == 0.0 and max(levels) <= 1.0
    assert levels[:4] == sorted(levels[:4])


def test_heatmap_of_layers_with_different_widths() -> None:
    usage = UsageData(10, (
        UsageLayer(1, "wide", (5, 0, 5, 0, 5, 5), 0.8, 1.5),
        UsageLayer(4, "narrow", (0, 10), 0.0, 2.0),
        UsageLayer(6, "idle", (0, 0, 0), 0.0, 0.0),
    ))  # fmt: skip
    heatmap = make_heatmap(usage)
    assert [row.label for row in heatmap.rows] == ["1", "4", "6"]
    assert [len(row.cells) for row in heatmap.rows] == [6, 2, 3]
    narrow = heatmap.rows[1].cells[1]
    assert narrow.level == 1.0 and heatmap.strongest == 2.0
    assert "10 choices, 100.0% of the layer, 2.00 times the balanced load" in narrow.title
    assert [cell.level for cell in heatmap.rows[2].cells] == [0.0, 0.0, 0.0]
    edge = max(cell.x for row in heatmap.rows for cell in row.cells) + heatmap.cell_width
    assert edge <= heatmap.width


def test_a_heatmap_of_a_large_model_stays_readable() -> None:
    usage = UsageData(9, tuple(UsageLayer(i, str(i), (3,) * 256, 1.0, 1.0) for i in range(58)))
    heatmap = make_heatmap(usage)
    assert sum(len(row.cells) for row in heatmap.rows) == 58 * 256
    assert heatmap.cell_width >= 4 and heatmap.rows[0].cells[0].label == ""
    assert len(heatmap.ticks) < 80


def test_plots_name_everybody_and_follow_the_colours() -> None:
    plots = speed_plots(make_bench())
    assert [title for title, _, _ in plots] == ["Time relative to the engine", "Latency", "Routing skew"]
    for _, _, svg in plots[:2]:
        assert all(f">{name}<" in svg for name in NAMES)
        assert "var(--series-0)" in svg and "var(--ink-2)" in svg
        assert "http" not in svg and "#0a0b" not in svg and "#0102" not in svg
    for routing in ("uniform", "real", "zipf", "one-hot"):
        assert f"prefill 1x512 {routing}" in plots[2][2]
    assert "max/mean load 4.00" in plots[2][2]


def test_plots_show_the_ratio() -> None:
    relative = speed_plots(make_bench())[0][2]
    shown = re.findall(r">(\d+\.\d\d)<", relative)
    assert {"2.00", "1.40", "1.20", "0.50"} <= set(shown)


def test_plots_leave_out_what_was_not_measured() -> None:
    alone = tuple(r for r in make_bench().rows if r.contestant == "engine" and r.routing == "real")
    report = make_bench()
    ratios = tuple(r for r in report.ratios if r.routing == "real")
    engine = BenchReport.from_dict({
        **report.to_dict(),
        **{k: v for k, v in make_bench(
            rows=alone, ratios=ratios, contestants=report.contestants[:1], order=("engine",)
        ).to_dict().items()},
    })  # fmt: skip
    assert [title for title, _, _ in speed_plots(engine)] == ["Latency"]
    assert speed_plots(make_bench(rows=(), ratios=())) == []


def test_dollar_signs_in_names_are_no_formulas() -> None:
    report = make_bench()
    contestants = (report.contestants[0], *[c for c in report.contestants[1:2]])
    odd = tuple(row(name, "decode", 1.0) for name in ("engine", "pytorch-eager"))
    renamed = BenchReport.from_dict(
        _renamed(make_bench(rows=odd, contestants=contestants).to_dict(), "pytorch-eager", "$x_1$ <b>")
    )
    # Its ratios speak of rows that are not there any more: left out, no error.
    svg = speed_plots(renamed)[0][2]
    assert "$x_1$ &lt;b&gt;" in svg


def _renamed(data: Any, old: str, new: str) -> Any:
    if isinstance(data, dict):
        return {k: _renamed(v, old, new) for k, v in data.items()}
    if isinstance(data, list):
        return [_renamed(v, old, new) for v in data]
    return new if data == old else data


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(None), "–"), (number(0), "0"), (number(1234567), "1,234,567"), (number(1.5e-6), "1.50e-06"),
        (number(0.25), "0.25"), (number(float("inf")), "inf"), (number(True), "True"),
        (milliseconds(0.0421), "0.042"), (milliseconds(3.777), "3.78"), (milliseconds(1650.4), "1,650"),
        (seconds(0.9), "0.90 s"), (seconds(165.2), "165 s"), (seconds(None), "–"),
        (times(1.849), "1.85×"), (times(None), "–"),
        (percent(1.0), "100.0 %"), (percent(0.99999), "> 99.9 %"), (percent(0.5), "50.0 %"),
        (percent(None), "–"),
        (size(512), "512 bytes"), (size(5 << 20), "5.0 MiB"), (size(3000 << 30), "3000.0 GiB"),
        (size(None), "–"),
        (parameters(46_703_000_000), "46.70 B"), (parameters(3_410_000), "3.41 M"), (parameters(12), "12"),
        (parameters(None), "–"),
    ],
)  # fmt: skip
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected
