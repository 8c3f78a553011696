"""What a verification found, as plain data: written into bundles, read by reports and by CI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..schema import from_json, to_json
from .compare import TensorError
from .layers import LayerResult
from .logits import LogitError
from .tolerance import Limit

REPORT_SCHEMA_VERSION = 1
SIMULATED = "simulated, not run on a GPU"
"""How a report of a simulation is headed."""

FINDING_KINDS: dict[str, str] = {
    "not a number": "the engine gives NaN or infinity where the source model does not",
    "shape": "a tensor has another shape than the source model's",
    "engine error": "the engine refused or failed on an input it should accept",
    "before the MoE": "a layer's input is wrong: attention, positions, norms, what follows the layer before",
    "KV cache": "only runs in chunks fail: cached keys, values or states, or positions after the first chunk",
    "attention mask": "only runs with padding fail",
    "wrong router": "a layer's input is right, its choice of experts is not",
    "wrong router weights": "the right experts are chosen with wrong weights",
    "dropped token": "a token lacks assignments or output that the source model gives it",
    "wrong expert": "input and routing are right, the layer's output is not",
    "after the MoE": "every MoE layer agrees, the model's output does not",
    "optimised engine": "the engine as users run it differs from the same engine with its routing shown",
    "not verified": "nothing of a layer could be compared",
    "dense": "a model without MoE layers gives another output",
    "reference": "the source model itself gives NaN or fails",
}
"""Every kind a :class:`Finding` may have and what it means."""


@dataclass(frozen=True)
class Check:
    """One number held against its limit. ``judged`` is False for numbers that inform and cannot fail a case.

    ``level`` names the tolerance, ``subject`` the output or layer. ``value`` None: not a number. ``detail``
    gives the coordinates and both values of the worst element; ``reason`` says why the limit is what it is,
    or why the number is not judged.
    """

    level: str
    subject: str
    value: float | None
    limit: float
    passed: bool
    reason: str
    judged: bool = True
    detail: str = ""


@dataclass(frozen=True)
class CaseResult:
    """One input run one way. ``mode``: ``free`` (the engine routes) or ``forced`` (replays the reference)."""

    name: str
    mode: str
    tags: tuple[str, ...]
    description: str
    passed: bool
    seconds: float
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    seed: int | None = None
    chunks: tuple[int, ...] = ()
    error: str = ""
    checks: tuple[Check, ...] = ()
    outputs: dict[str, TensorError] = field(default_factory=dict)
    logits: LogitError | None = None
    layers: tuple[LayerResult, ...] = ()

    @property
    def failures(self) -> tuple[Check, ...]:
        """The judged checks that did not pass."""
        return tuple(c for c in self.checks if c.judged and not c.passed)


@dataclass(frozen=True)
class Finding:
    """The first place where the engine diverges, in words. ``kind`` is a key of :data:`FINDING_KINDS`.

    ``cases`` are the cases that show it. Layer, token (row of the layer, batch, position) and experts where
    known.
    """

    kind: str
    message: str
    cases: tuple[str, ...]
    layer: int | None = None
    layer_name: str = ""
    token: int | None = None
    batch: int | None = None
    position: int | None = None
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerCoverage:
    """What of one layer was verified at all, over all cases: tokens, and which experts never got one."""

    index: int
    name: str
    routed_tokens: int
    weight_tokens: int
    num_experts: int
    unused_experts: tuple[int, ...]


@dataclass(frozen=True)
class ParityReport:
    """Result of :func:`moe_export.verify.verify_bundle`.

    ``against`` says what the yardstick was, ``source_hash`` which model. ``findings`` name the first
    divergence (empty when all passed); ``notes`` what was left out or capped and why.
    """

    passed: bool
    bundle: str
    against: str
    source: str
    source_hash: str
    task: str
    target: str
    dtype: str
    seed: int
    force_routing: bool
    tolerances: tuple[Limit, ...]
    cases: tuple[CaseResult, ...]
    findings: tuple[Finding, ...] = ()
    coverage: tuple[LayerCoverage, ...] = ()
    notes: tuple[str, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0
    quantization: str | None = None
    """``int8`` or ``int4``: how the engine stores its experts."""
    simulated: bool = False
    """The lowered graph was run on the CPU in place of the engine on its GPU."""
    schema_version: int = REPORT_SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (no NaN or infinity: such numbers are null and named in words)."""
        data: dict[str, Any] = to_json(self)
        data["summary"] = self.summary()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ParityReport:
        """Rebuild a report from :meth:`to_dict`.

        Raises:
            UsageError: another schema version, or a missing, unknown or wrong field (named).
        """
        values = {k: v for k, v in data.items() if k != "summary"} if isinstance(data, dict) else data
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != REPORT_SCHEMA_VERSION:
            raise UsageError(
                f"parity report: schema version {version!r} where this moe-export reads "
                f"{REPORT_SCHEMA_VERSION}; verify the bundle again"
            )
        try:
            report: ParityReport = from_json(cls, values, "parity report")
        except ValueError as error:
            raise UsageError(str(error)) from error
        return report

    def summary(self) -> dict[str, Any]:
        """The few numbers a manifest or a table shows; ``None`` where a level does not apply.

        ``max_error`` and ``relative_error`` are of the model's outputs over the judged runs;
        ``route_agreement`` is the part of tokens, over layers and free runs, with the reference's expert
        sets. ``forced_error`` is ``relative_error`` over the runs with the reference's routing replayed; None
        where there was none. ``cross_entropy_change`` is the largest of the texts with enough positions to
        be judged, or of all where none has.
        """
        from .output_checks import MANY_TOKENS

        judged = [c for c in self.cases if not c.error]
        errors = [
            e
            for c in judged
            for name, e in c.outputs.items()
            if any(k.level == name and k.judged for k in c.checks) and e.max_abs is not None
        ]
        forced = [
            e.relative
            for c in judged
            if c.mode == "forced"
            for e in c.outputs.values()
            if e.relative is not None
        ]
        routing = [r.routing for c in judged if c.mode == "free" for r in c.layers if r.routing is not None]
        tokens = sum(r.tokens for r in routing)
        logits = [c.logits for c in judged if c.mode == "free" and c.logits is not None]
        kl = [v.kl_mean for v in logits if v.kl_mean is not None]
        texts = [v for v in logits if v.cross_entropy_change is not None]
        longer = [v for v in texts if v.tokens >= MANY_TOKENS] or texts
        change = [abs(v.cross_entropy_change) for v in longer if v.cross_entropy_change is not None]
        return {
            "passed": self.passed,
            "simulated": self.simulated,
            "against": self.against,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "cases": len(self.cases),
            "failed_cases": sum(not c.passed for c in self.cases),
            "max_error": max((e.max_abs for e in errors if e.max_abs is not None), default=None),
            "relative_error": max((e.relative for e in errors if e.relative is not None), default=None),
            "forced_error": max(forced, default=None),
            "route_agreement": sum(r.same_sets for r in routing) / tokens if tokens else None,
            "routed_tokens": tokens,
            "near_ties": sum(r.near_ties for r in routing),
            "kl_mean": max(kl, default=None),
            "cross_entropy_change": max(change, default=None),
            "first_divergence": self.findings[0].message if self.findings else None,
        }
