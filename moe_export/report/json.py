"""The report as JSON: the same content as the HTML page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .content import make_report, report_data

if TYPE_CHECKING:
    from ..bundle.reader import Bundle


def render_json(
    bundle: Bundle,
    *,
    parity: dict[str, Any] | None = None,
    bench: dict[str, Any] | None = None,
    usage: dict[str, Any] | None = None,
) -> str:
    """``report.json`` as text; ``docs/report.md`` describes it.

    Raises:
        UsageError: a part has another schema or a wrong field.
    """
    data = report_data(make_report(bundle, parity=parity, bench=bench, usage=usage))
    return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
