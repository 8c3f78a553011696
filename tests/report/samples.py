"""Parts of a report: a real bundle, a real parity report, chosen benchmark and usage numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moe_export.bundle.manifest import read_manifest
from moe_export.bundle.reader import Bundle
from moe_export.schema import Alternative, Decision
from tests.helpers.tiny_bundle import make_tiny_bundle

HOSTILE = "<script>alert(1)</script>"
QUOTES = "\"'></td><img src=x onerror=alert(1)>"

DECISIONS = tuple(
    Decision(
        subject=f"layers.{i}.moe",
        choice="unrolled experts",
        reason="one MatMul per used expert was fastest",
        alternatives=(Alternative("loop", "slower here", {"prefill": 3.5 + i}),),
        measured_ms={"prefill": 2.5 + i},
    )
    for i in range(2)
) + (Decision("attention", "fused", "the library has a kernel for it"),)


def make_usage(layers: int = 2, experts: int = 4) -> dict[str, Any]:
    """Usage with different counts per layer and expert, as ``Usage.to_dict()`` gives it."""
    found = []
    for i in range(layers):
        counts = [(i + 1) * e * 3 for e in range(experts)]
        found.append({
            "index": i, "name": f"layers.{i}.moe", "num_experts": experts, "counts": counts,
            "mean_weight": [None, *[0.5] * (experts - 1)], "dropped": 0, "entropy": 0.8,
            "max_over_mean": 1.5, "unused": 1,
        })  # fmt: skip
    return {"tokens": 1234, "layers": found}


def make_bundle(folder: Path, **changes: Any) -> Bundle:
    """A tiny bundle with decisions; ``changes`` replace fields of its manifest."""
    root = make_tiny_bundle(folder)
    manifest = dataclasses.replace(read_manifest(root), **{"decisions": DECISIONS, **changes})
    return Bundle(root, manifest)


def hostile_bundle(folder: Path) -> Bundle:
    """A bundle whose names try to break out of the page."""
    bundle = make_bundle(folder)
    m = bundle.manifest
    io = dataclasses.replace(
        m.io, inputs=(dataclasses.replace(m.io.inputs[0], name=HOSTILE), *m.io.inputs[1:])
    )
    layers = tuple(
        dataclasses.replace(x, name=f"{HOSTILE}{QUOTES}", router_note=QUOTES) for x in m.moe_layers
    )
    source = dataclasses.replace(m.source, path=f"/models/{HOSTILE}", class_name=QUOTES, model_type=HOSTILE)
    decision = dataclasses.replace(DECISIONS[0], subject=HOSTILE, choice=QUOTES, reason=HOSTILE)
    manifest = dataclasses.replace(
        m,
        io=io,
        moe_layers=layers,
        source=source,
        decisions=(decision,),
        notes=(HOSTILE,),
        tools={HOSTILE: QUOTES},
    )
    return Bundle(bundle.path, manifest)
