"""Checks of a model's outputs in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .compare import TensorError, compare_arrays
from .inputs import Case, output_mask, valid_masks
from .logits import LogitError, compare_logits
from .result import Check
from .tolerance import Tolerances

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Manifest
    from ..trace import TracedRun

MANY_TOKENS = 32
"""From this many positions on, averages of a free low-precision run (KL, cross-entropy) mean something."""


def output_checks(
    case: Case,
    forced: bool,
    got: Mapping[str, NDArray[Any]],
    reference: TracedRun,
    manifest: Manifest,
    tolerances: Tolerances,
    excuse: str,
) -> tuple[list[Check], dict[str, TensorError], LogitError | None]:
    """Checks of every output but the caches, their errors, and the comparison of logits where there are any.

    ``excuse``: why values are not judged in this run; empty when they are.
    """
    checks: list[Check] = []
    errors: dict[str, TensorError] = {}
    logit_error: LogitError | None = None
    for spec in manifest.io.outputs:
        if spec.role == "cache":
            continue
        name = spec.name
        error = _output_error(name, got, reference, case)
        errors[name] = error
        checks += _output_checks(name, error, tolerances, excuse)
        if spec.role == "logits" and not error.problem and reference.outputs[name].ndim == 3:
            logit_error = _logits(name, got, reference, case, error, tolerances)
            checks += _logit_checks(name, logit_error, case, forced, excuse, tolerances)
    return checks, errors, logit_error


def _output_error(
    name: str, got: Mapping[str, NDArray[Any]], reference: TracedRun, case: Case
) -> TensorError:
    if name not in reference.outputs:
        return TensorError(0, problem=f"the reference gives no output {name!r}")
    if name not in got:
        return TensorError(0, problem=f"the engine gives no output {name!r}")
    expected = reference.outputs[name]
    return compare_arrays(got[name], expected, output_mask(expected.shape, valid_masks(case)))


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
    name: str,
    got: Mapping[str, NDArray[Any]],
    reference: TracedRun,
    case: Case,
    error: TensorError,
    tolerances: Tolerances,
) -> LogitError:
    import numpy as np

    expected = reference.outputs[name]
    mask = output_mask(expected.shape, valid_masks(case))
    labels = case.inputs.get("decoder_input_ids", case.inputs.get("input_ids")) if case.is_text else None
    if labels is not None and labels.shape != expected.shape[:2]:
        labels = None
    return compare_logits(
        got[name],
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
