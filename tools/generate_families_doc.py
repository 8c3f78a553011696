"""Writes docs/families.md from the registry and the measurements: python tools/generate_families_doc.py
[--check].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from doc_page import ROOT, write_or_check

from moe_export.models.families import FAMILIES, NOT_MOE, Family

PAGE = ROOT / "docs" / "families.md"
RESULTS = ROOT / "moe_export" / "models" / "families" / "results.json"

HEAD = """\
# MoE families

Written by `tools/generate_families_doc.py` from the registry (`moe_export/models/families/`) and the
measurements of `tools/measure_families.py`; a test fails when it is stale. A family is a folder of
`transformers/models` with an MoE block; a test proves that none of the installed transformers is missing.

**{works} work, {limited} work with a stated limit, {refused} are refused.**

Each is measured on a small random model whose routing features are on (groups, selection biases, windows,
dropped tokens) and whose every parameter is random. It is traced once, with 3 rows of 5 new and 11 past
tokens. Its engines run whole sequences of 1×1, 1×5, 3×13 and 2×29 tokens, 3×13 with a row padded on the
left, and 2×19 tokens through the KV cache in pieces of {chunks}. Compared are the logits (or hidden states)
with transformers' own float32 code, and for every MoE layer the experts and weights of every token.

- *error*: largest difference over max(1, |reference|max) over all these runs, as float32, for the `portable`
and the
  `onnxruntime` target. Allowed is 1e-05 unless the family's row says more.
- *router*: `op` where the router was proven equal to the Router op and is one node, `plain` where it stays
as the
  nodes of the model's own code.
- *layers*: MoE layers of the measured model.

Measured with {versions}. How to add one: [add-a-family.md](add-a-family.md).
"""


def page() -> str:
    """The whole page as Markdown."""
    data: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {row["model_class"]: row for row in data["measurements"]}
    by_status = {s: [f for f in FAMILIES.values() if f.status == s] for s in ("works", "limited", "refused")}
    head = HEAD.format(
        **{status: len(families) for status, families in by_status.items()},
        chunks=", ".join(str(c) for c in data["chunks"]),
        versions=", ".join(f"{name} {version}" for name, version in data["versions"].items()),
    )
    parts = [head, "## Work", "", *_table(by_status["works"], rows)]
    parts += ["", "## Work with a limit", "", *_table(by_status["limited"], rows)]
    parts += ["", "## Refused", "", "| family | routing | reason |", "|---|---|---|"]
    parts += [f"| {f.name} | {f.routing} | {f.reason} |" for f in by_status["refused"]]
    parts += ["", "## Look like one and are none", "", "| folder | why |", "|---|---|"]
    parts += [f"| {name} | {why} |" for name, why in sorted(NOT_MOE.items())]
    return "\n".join(parts) + "\n"


def _table(families: Iterable[Family], rows: dict[str, Any]) -> Iterable[str]:
    columns = ("family", "class", "routing of the measured model", "router", "layers", "error", "notes")
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|---|"
    for family in families:
        for model_class in family.classes:
            row = rows.get(model_class)
            router = (
                {"Router op": "op", "plain nodes": "plain"}.get(row["router"], row["router"]) if row else "?"
            )
            error = "{portable:.1e} / {onnxruntime:.1e}".format(**row["max_error"]) if row else "not measured"
            cells = (
                family.name,
                f"`{model_class}`",
                family.routing,
                router,
                row["moe_layers"] if row else "?",
                error,
            )
            yield f"| {' | '.join(str(c) for c in cells)} | {_notes(family)} |"


def _notes(family: Family) -> str:
    notes = [family.scope, family.reason]
    if family.tolerance_reason:
        notes.append(f"error up to {family.tolerance:.0e} allowed: {family.tolerance_reason}")
    return "; ".join(n for n in notes if n)


def main() -> int:
    """Write the page, or with ``--check`` tell whether it is fresh."""
    return write_or_check(PAGE, page, __file__)


if __name__ == "__main__":
    sys.exit(main())
