"""Holds one run against the reference: numbers, limits, verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .compare import TensorError, compare_arrays
from .inputs import Case, output_mask, valid_masks
from .layer_checks import broken_layer, layer_checks
from .layers import LayerComparison, compare_layers
from .logits import LogitError, compare_logits
from .result import CaseResult, Check
from .tolerance import Tolerances

if TYPE_CHECKING:
    from ..schema import Manifest
    from ..trace import TracedRun

MANY_TOKENS = 32
"""From this many positions on, averages of a free low-precision run (KL, cross-entropy) mean something."""


@dataclass(frozen=True)
class JudgedRun:
    """A case's verdict and the arrays it came from, for localisation."""

    case: Case
    result: CaseResult
    layers: tuple[LayerComparison, ...]

    @property
    def tie_flipped(self) -> bool:
        """Whether a proven near tie went the other way somewhere in this run."""
        return any(bool(layer.routing.near_tie.any()) for layer in self.layers)


def judge(
    case: Case,
    mode: str,
    engine: TracedRun,
    reference: TracedRun,
    manifest: Manifest,
    tolerances: Tolerances,
    seconds: float = 0.0,
) -> JudgedRun:
    """Compare a run with the reference. ``mode``: ``free``, or ``forced`` (the reference's routing)."""
    forced = mode == "forced"
    masks = valid_masks(case)
    comparisons, layers = compare_layers(
        engine, reference, manifest.moe_layers, masks, tolerances, forced=forced
    )
    tie = any(bool(c.routing.near_tie.any()) for c in comparisons)
    excuse = _excuse(forced, tie, bool(manifest.moe_layers), tolerances)
    checks: list[Check] = []
    outputs: dict[str, TensorError] = {}
    logit_error: LogitError | None = None
    roles = {t.name: t.role for t in manifest.io.outputs}
    for name in [n for n in roles if roles[n] != "cache"]:
        error = _output_error(name, engine, reference, case)
        outputs[name] = error
        checks += _output_checks(name, error, tolerances, excuse)
        got = engine.outputs.get(name)
        if roles[name] == "logits" and got is not None and got.ndim == 3 and not error.problem:
            logit_error = _logits(name, engine, reference, case, error, tolerances)
            checks += _logit_checks(name, logit_error, case, forced, excuse, tolerances)
    for comparison in comparisons:
        checks += layer_checks(comparison, forced, tolerances)
    checks += [broken_layer(r) for r in layers if r.problem]
    result = CaseResult(
        name=case.name,
        mode=mode,
        tags=case.tags,
        description=case.description,
        passed=all(c.passed or not c.judged for c in checks),
        seconds=seconds,
        inputs={k: tuple(int(d) for d in v.shape) for k, v in case.inputs.items()},
        seed=case.seed,
        chunks=case.chunks,
        checks=tuple(checks),
        outputs=outputs,
        logits=logit_error,
        layers=tuple(layers),
    )
    return JudgedRun(case, result, tuple(comparisons))


def _excuse(forced: bool, tie: bool, has_moe: bool, tolerances: Tolerances) -> str:
    """Why values of this run are not judged; empty when they are."""
    if forced or not has_moe:
        return ""
    if not tolerances.exact_routing:
        return "a flipped near tie changes values; they are judged with routing forced"
    return "a proven near tie flipped in this run; values are judged with routing forced" if tie else ""


def _output_error(name: str, engine: TracedRun, reference: TracedRun, case: Case) -> TensorError:
    if name not in reference.outputs:
        return TensorError(0, problem=f"the reference gives no output {name!r}")
    if name not in engine.outputs:
        return TensorError(0, problem=f"the engine gives no output {name!r}")
    expected = reference.outputs[name]
    return compare_arrays(engine.outputs[name], expected, output_mask(expected.shape, valid_masks(case)))


def _output_checks(name: str, error: TensorError, tolerances: Tolerances, excuse: str) -> list[Check]:
    limit, rms = tolerances[name], tolerances[f"{name}.rms"]
    if error.problem:
        return [Check(name, name, None, limit.value, False, limit.reason, detail=error.problem)]
    where = error.worst.text() if error.worst is not None else ""
    if error.nonfinite:
        detail = f"{error.nonfinite} of {error.count} values are not finite; {where}"
        return [Check(name, name, None, limit.value, False, limit.reason, detail=detail)]
    if error.max_abs is None or error.rms is None:
        # Nothing but equal infinities, or no compared position at all.
        return [
            Check(name, name, 0.0, limit.value, True, limit.reason, detail=f"{error.count} values compared")
        ]
    scale = max(1.0, error.scale)
    value, rms_value = error.max_abs / scale, error.rms / scale
    return [
        Check(
            name, name, value, limit.value, value <= limit.value, excuse or limit.reason, not excuse, where
        ),
        Check(
            f"{name}.rms",
            name,
            rms_value,
            rms.value,
            rms_value <= rms.value,
            excuse or rms.reason,
            not excuse,
            f"root mean square over {error.count} values; worst {where}",
        ),
    ]


def _logits(
    name: str, engine: TracedRun, reference: TracedRun, case: Case, error: TensorError, tolerances: Tolerances
) -> LogitError:
    import numpy as np

    expected = reference.outputs[name]
    mask = output_mask(expected.shape, valid_masks(case))
    labels = case.inputs.get("decoder_input_ids", case.inputs.get("input_ids")) if case.is_text else None
    if labels is not None and labels.shape != expected.shape[:2]:
        labels = None
    return compare_logits(
        engine.outputs[name],
        expected,
        np.ones(expected.shape[:2], bool) if mask is None else mask,
        None if labels is None else np.asarray(labels, np.int64),
        tie_bound=2 * tolerances[name].value * max(1.0, error.scale),
    )


def _logit_checks(
    name: str, error: LogitError, case: Case, forced: bool, excuse: str, tolerances: Tolerances
) -> list[Check]:
    if excuse and not tolerances.exact_routing and error.tokens >= MANY_TOKENS:
        excuse = ""
    elif excuse and not tolerances.exact_routing:
        excuse = (
            f"under {MANY_TOKENS} positions one flipped near tie would decide; judged with routing forced"
        )
    change = error.cross_entropy_change
    values = [
        ("logits.kl", error.kl_mean, f"largest at one position {_number(error.kl_max)} nats"),
        (
            "logits.top1",
            error.top1_unexplained,
            f"same first choice at {_percent(error.top1)} of {error.tokens} positions",
        ),
    ]
    if case.is_text and change is not None:
        detail = (
            f"engine {_number(error.cross_entropy)}, reference {_number(error.cross_entropy_reference)} nats"
        )
        values.append(("logits.cross_entropy", abs(change), detail))
    checks = []
    for level, value, detail in values:
        limit = tolerances[level]
        passed = value is not None and value <= limit.value
        judged = not excuse and error.tokens > 0
        checks.append(Check(level, name, value, limit.value, passed, excuse or limit.reason, judged, detail))
    return checks


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.6g}"


def _percent(value: float | None) -> str:
    return "an unknown part" if value is None else f"{value:.2%}"
