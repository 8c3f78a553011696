"""What a report says, as plain JSON values: the same for ``report.json`` and for the HTML page."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.result import BenchReport
from ..bundle.label import bundle_label
from ..errors import UsageError
from ..schema import Decision, Manifest, from_json, to_json
from ..verify.result import ParityReport

if TYPE_CHECKING:
    from ..bundle.reader import Bundle

REPORT_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class UsageLayer:
    """How often each expert of one layer was chosen. ``dropped``: assignments that no expert took."""

    index: int
    name: str
    counts: tuple[int, ...]
    entropy: float
    max_over_mean: float
    dropped: int = 0
    unused: int = 0

    def share(self, expert: int) -> float:
        """Part of the layer's assignments that went to ``expert``."""
        total = sum(self.counts)
        return self.counts[expert] / total if total else 0.0


@dataclass(frozen=True)
class UsageData:
    """Expert usage over ``tokens`` tokens."""

    tokens: int
    layers: tuple[UsageLayer, ...]


@dataclass(frozen=True)
class Report:
    """Everything that is known about a bundle; what was not done is None."""

    bundle: str
    manifest: Manifest
    size_bytes: int
    parity: ParityReport | None
    bench: BenchReport | None
    usage: UsageData | None
    created: str


def make_report(
    bundle: Bundle,
    *,
    parity: dict[str, Any] | None = None,
    bench: dict[str, Any] | None = None,
    usage: dict[str, Any] | None = None,
) -> Report:
    """Read the parts (dictionaries as ``to_dict`` of each made them).

    Raises:
        UsageError: a part has another schema or a field of a wrong type; the message names it.
    """
    return Report(
        bundle=bundle_label(bundle.path),
        manifest=bundle.manifest,
        size_bytes=_size(bundle),
        parity=None if parity is None else ParityReport.from_dict(parity),
        bench=None if bench is None else BenchReport.from_dict(bench),
        usage=None if usage is None else _usage(usage),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def report_data(report: Report) -> dict[str, Any]:
    """The whole report as JSON values; ``docs/report.md`` describes them."""
    return {
        "schema_version": REPORT_SCHEMA_VERSION,
        "created": report.created,
        "bundle": report.bundle,
        "summary": summary(report),
        "routing": to_json(report.usage),
        "parity": None if report.parity is None else report.parity.to_dict(),
        "bench": None if report.bench is None else report.bench.to_dict(),
        "decisions": [to_json(d) for d in report.manifest.decisions],
        "manifest": to_json(report.manifest),
    }


def summary(report: Report) -> dict[str, Any]:
    """The headline numbers. ``verdict``: ``passed``, ``failed`` or ``not verified``."""
    manifest, parity, bench = report.manifest, report.parity, report.bench
    layers = manifest.moe_layers
    verdict = "not verified" if parity is None else "passed" if parity.passed else "failed"
    return {
        "source": manifest.source.path or f"a live {manifest.source.class_name}",
        "model": manifest.source.class_name,
        "family": manifest.source.model_type,
        "task": manifest.task,
        "target": manifest.target,
        "dtype": manifest.dtype,
        "size_bytes": report.size_bytes,
        "parameters": dict(manifest.parameters),
        "moe_layers": len(layers),
        "experts": sorted({layer.num_experts for layer in layers}),
        "top_k": sorted({layer.top_k for layer in layers}),
        "verdict": verdict,
        "parity": None if parity is None else parity.summary(),
        "speedup": None if bench is None else bench.summary(),
    }


def group_decisions(decisions: tuple[Decision, ...]) -> list[tuple[list[str], Decision]]:
    """Decisions that differ in subject only, together: (subjects, one of them), in their first order.

    Measured times differ from layer to layer, so they do not tell groups apart; the first one's are shown.
    """
    groups: dict[Any, tuple[list[str], Decision]] = {}
    for decision in decisions:
        key = (decision.choice, decision.reason, tuple((a.choice, a.reason) for a in decision.alternatives))
        groups.setdefault(key, ([], decision))[0].append(decision.subject)
    return list(groups.values())


def _usage(data: dict[str, Any]) -> UsageData:
    """The fields of a usage dictionary that a report shows; more are allowed."""
    if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
        raise UsageError("usage: expected an object with 'tokens' and a list 'layers'")
    known = set(UsageLayer.__dataclass_fields__)
    layers = []
    for layer in data["layers"]:
        if not isinstance(layer, dict):
            raise UsageError(f"usage: a layer is {type(layer).__name__}, expected an object")
        layers.append({k: v for k, v in layer.items() if k in known})
    try:
        usage: UsageData = from_json(UsageData, {"tokens": data.get("tokens"), "layers": layers}, "usage")
    except ValueError as error:
        raise UsageError(str(error)) from error
    for layer in usage.layers:
        if not layer.counts or min(layer.counts) < 0:
            raise UsageError(f"usage: layer {layer.index} has no counts of 0 or more per expert")
    return usage


def _size(bundle: Bundle) -> int:
    """Bytes of the engine: all files but reports. Counted on disk where the manifest lists none yet."""
    listed = [f.size for f in bundle.manifest.files if not f.path.startswith("evidence/")]
    if listed:
        return sum(listed)
    root = Path(bundle.path)
    files = (p for p in root.rglob("*") if p.is_file() and p.relative_to(root).parts[0] != "evidence")
    return sum(p.stat().st_size for p in files)
