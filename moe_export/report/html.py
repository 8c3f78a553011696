"""The report of a bundle as one HTML file that needs nothing else: no network, no scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, UsageError
from ..schema import to_json
from . import formats, parity_view
from .content import Report, group_decisions, make_report, report_data, summary
from .heatmap import make_heatmap
from .plots import speed_plots

if TYPE_CHECKING:
    from ..bundle.reader import Bundle

_TEMPLATES = Path(__file__).parent / "templates"
EVIDENCE = "evidence"
REPORT_HTML, REPORT_JSON = "report.html", "report.json"


def render_html(
    bundle: Bundle | Path | str,
    *,
    parity: dict[str, Any] | None = None,
    bench: dict[str, Any] | None = None,
    usage: dict[str, Any] | None = None,
) -> str:
    """The report as HTML text. What is None was not done, and the page says so.

    Args:
        bundle: an opened bundle, or a bundle's folder (its manifest is read, its hashes are not checked).
        parity, bench, usage: what ``ParityReport``, ``BenchReport`` and ``Usage`` give as ``to_dict()``.

    Raises:
        BundleError: the folder has no sound manifest.
        UsageError: a part has another schema or a wrong field.
    """
    return _page(make_report(as_bundle(bundle), parity=parity, bench=bench, usage=usage))


def report_files(
    bundle: Bundle | Path | str,
    *,
    parity: dict[str, Any] | None = None,
    bench: dict[str, Any] | None = None,
    usage: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """``report.html`` and ``report.json`` by name; arguments and errors as for :func:`render_html`."""
    report = make_report(as_bundle(bundle), parity=parity, bench=bench, usage=usage)
    text = json.dumps(report_data(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    return {REPORT_HTML: _page(report).encode(), REPORT_JSON: text.encode()}


def write_report(
    bundle: Bundle | Path | str,
    *,
    parity: dict[str, Any] | None = None,
    bench: dict[str, Any] | None = None,
    usage: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into the bundle's ``evidence`` folder; returns their paths.

    A part that is None is taken from ``evidence/parity.json``, ``bench.json`` or ``usage.json`` where that
    exists.

    Raises:
        BundleError: the folder is no bundle, or an evidence file is not JSON.
        UsageError: a part has another schema or a wrong field, or the folder cannot be written.
    """
    from ..bundle.evidence import save_evidence

    opened = as_bundle(bundle)
    parts = {
        name: value if value is not None else read_part(opened.path, name)
        for name, value in (("parity", parity), ("bench", bench), ("usage", usage))
    }
    save_evidence(opened, report_files(opened, **parts))
    folder = opened.path / EVIDENCE
    return folder / REPORT_HTML, folder / REPORT_JSON


def as_bundle(bundle: Bundle | Path | str) -> Bundle:
    """An opened bundle as it is; for a folder its manifest, read without checking hashes.

    Raises:
        BundleError: the folder has no sound manifest.
    """
    if not isinstance(bundle, (str, Path)):
        return bundle
    from ..bundle.manifest import read_manifest
    from ..bundle.reader import Bundle as Opened

    return Opened(Path(bundle), read_manifest(Path(bundle)))


def read_part(folder: Path, name: str) -> dict[str, Any] | None:
    """``evidence/<name>.json`` of a bundle, or None where there is none.

    Raises:
        BundleError: it is not a JSON object.
    """
    path = folder / EVIDENCE / f"{name}.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _page(report: Report) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=formats.number, ms=formats.milliseconds, seconds=formats.seconds, times=formats.times,
        percent=formats.percent, size=formats.size, parameters=formats.parameters, shape=formats.shape,
    )  # fmt: skip
    parity, bench, usage = report.parity, report.bench, report.usage
    try:
        return str(
            environment.get_template("report.html").render(
                report=report,
                manifest=report.manifest,
                manifest_json=json.dumps(to_json(report.manifest), indent=2, ensure_ascii=False),
                summary=summary(report),
                usage=usage,
                heatmap=make_heatmap(usage) if usage is not None and usage.layers else None,
                parity=parity,
                levels=parity_view.levels(parity) if parity is not None else [],
                layers=parity_view.layer_views(parity) if parity is not None else [],
                ties=parity_view.ties(parity) if parity is not None else [],
                bench=bench,
                skipped=_skipped(report),
                plots=_plots(report),
                decisions=group_decisions(report.manifest.decisions),
            )
        )
    except jinja2.TemplateError as error:
        raise UsageError(f"the report cannot be drawn: {error}") from error


def _plots(report: Report) -> list[tuple[str, str, Any]]:
    from markupsafe import Markup

    if report.bench is None:
        return []
    # The SVG is made here by matplotlib, which escapes the texts in it.
    return [(title, text, Markup(svg)) for title, text, svg in speed_plots(report.bench)]


def _skipped(report: Report) -> list[tuple[str, str]]:
    from ..bench.table import group_skipped

    return [] if report.bench is None else group_skipped(report.bench.skipped)
