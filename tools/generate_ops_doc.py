"""Writes docs/ops.md from the ops' contracts: python tools/generate_ops_doc.py [--check]."""

from __future__ import annotations

import sys

from doc_page import ROOT, write_or_check

from moe_export.ops import DOMAIN, OPS, VERSION, Attribute, OpContract, Param

PAGE = ROOT / "docs" / "ops.md"

HEAD = f"""\
# Ops

Written by `tools/generate_ops_doc.py` from the contracts in `moe_export/ops/`; a test fails when it is stale.
[Add an op](add-an-op.md) says how a contract is written.

The ops have the ONNX domain `{DOMAIN}`, version {VERSION}. A model that uses them holds their bodies as ONNX
functions in the standard ops, so it runs in any ONNX runtime. An op *without a body* is one that standard ops
cannot do, such as an exchange with other ranks; it runs only where a kernel does it (the CPU plugin does).

Shapes: T tokens, E experts, K experts per token, H hidden, I intermediate, M = T·K assignments; A and B are
the columns and rows of one expert's matrix; R ranks, S slots (places of an expert) per rank, C rows
of a block.

For all of them:

- Between equal values the lower expert id wins.
- No token (T = 0), experts without a token, and one expert that gets all tokens are ordinary inputs.
- A dropped assignment has the expert id −1 and adds nothing to its token.
- An attribute marked *structural* changes the body. A model holds one body per op, so all its nodes agree on
  those.

A tolerance is the largest and the root-mean-square error against the float64 reference, relative to the
reference's largest magnitude (at least 1).
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *(line for op in OPS.values() for line in _section(op))])


def _section(op: OpContract) -> list[str]:
    parts = [f"## `{op.name}`", "", f"{_cell(op.summary).rstrip('.')}.", ""]
    if op.body is None:
        needs = "needs all ranks" if op.collective else "stops a run"
        parts += [f"Without a body: it {needs}.", ""]
    parts += _params("input", op.inputs) + _params("output", op.outputs)
    if op.attributes:
        parts += _table(
            ("attribute", "type", "default", "choices", "structural", "meaning"),
            [_attribute_row(a) for a in op.attributes],
        )
    else:
        parts += ["No attributes.", ""]
    if op.tolerance:
        parts += _table(
            ("dtype", "max error", "RMS error", "reason"),
            [[dtype, f"{t.max:g}", f"{t.rms:g}", t.reason] for dtype, t in op.tolerance.items()],
        )
    else:
        parts += ["No tolerance: results are equal to the reference.", ""]
    if op.source:
        parts += [f"Source: {_cell(op.source)}.", ""]
    return parts


def _params(kind: str, params: tuple[Param, ...]) -> list[str]:
    rows = [
        [
            f"`{p.name}`" + (" (optional)" if p.optional else f" (× `{p.count}`)" if p.count else ""),
            f"[{', '.join(p.shape)}]",
            ", ".join(p.dtypes),
            p.doc,
        ]
        for p in params
    ]
    return _table((kind, "shape", "dtypes", "meaning"), rows)


def _attribute_row(attribute: Attribute) -> list[str]:
    choices = ", ".join(f"`{c}`" for c in attribute.choices)
    if not choices and attribute.minimum is not None:
        choices = f"{attribute.minimum} or more"
    default = "required" if attribute.default is None else f"`{attribute.default!r}`"
    if isinstance(attribute.default, str):
        default = f"`{attribute.default}`" if attribute.default else "empty"
    return [
        f"`{attribute.name}`",
        attribute.kind.__name__,
        default,
        choices,
        "yes" if attribute.structural else "",
        attribute.doc,
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(_cell(c) for c in row)} |" for row in rows), ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write the page, or with ``--check`` tell whether it is fresh."""
    return write_or_check(PAGE, page, __file__)


if __name__ == "__main__":
    sys.exit(main())
