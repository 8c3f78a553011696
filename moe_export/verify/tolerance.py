"""How far an engine may be from its source, per level and dtype, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError, choices_text
from ..schema import DTYPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEVELS: dict[str, str] = {
    "moe.output": "largest error of a layer's input, router logits or output, relative to that token",
    "moe.output.rms": "root mean square over tokens of the error that moe.output bounds",
    "moe.outlier": "in low precision, the largest error that moe.output bounds, relative to the median token",
    "moe.weights": "largest error of a routing weight, by expert, relative to the token's largest weight",
    "moe.weights.rms": "root mean square over tokens of the error that moe.weights bounds",
    "moe.routing": "part of tokens whose expert set may differ without a proven near tie",
    "moe.near_tie": "error of router logits that the dtype explains, relative to the token's largest logit",
    "logits.kl": "mean KL(reference || engine) per position, in nats",
    "logits.top1": "part of positions whose first choice may differ although the reference is not undecided",
    "logits.cross_entropy": "change of cross-entropy on text, in nats per token, up or down",
}
"""Every level besides the outputs and what its number means."""
AGREEMENT, EXPERT = "moe.agreement", "moe.expert"
QUANTIZED_LEVELS: dict[str, str] = {
    AGREEMENT: "part of a layer's tokens with other experts than the source, near ties included, all cases",
    EXPERT: "error of an expert's tokens with routing forced, relative to the median expert's, all cases",
}
"""Levels that only engines with quantised experts have."""

_OUTPUT = "largest error of an element, relative to max(1, |reference| max)"
_OUTPUT_RMS = "root mean square error, relative to max(1, |reference| max)"

_FLOAT32 = "rounding to float32 (2^-24) per operation, other orders of summation, added up over the layers"
_FLOAT16 = "one rounding to float16 (2^-11) per operation, added up over the layers"
_BFLOAT16 = (
    "one rounding of weights or activations to bfloat16 (2^-8) per operation, added up over the layers"
)
_WHY = {"float32": _FLOAT32, "float16": _FLOAT16, "bfloat16": _BFLOAT16}
_EXACT = "float32 routes like its source except where a tie is proven"
_EVEN = "rounding spreads over all tokens; a mistake that touches few of them does not"
_FLIPS = "a token between two experts may go either way after rounding; more than this is not rounding"

_DEFAULTS: dict[str, dict[str, float]] = {
    "float32": {
        "output": 1e-5,
        "output.rms": 3e-6,
        "moe.output": 1e-4,
        "moe.output.rms": 2e-5,
        "moe.outlier": 100.0,
        "moe.weights": 1e-4,
        "moe.weights.rms": 2e-5,
        "moe.routing": 0.0,
        "moe.near_tie": 1e-5,
        "logits.kl": 1e-6,
        "logits.top1": 0.0,
        "logits.cross_entropy": 1e-5,
    },
    "float16": {
        "output": 2e-2,
        "output.rms": 4e-3,
        "moe.output": 6e-2,
        "moe.output.rms": 1.2e-2,
        "moe.outlier": 100.0,
        "moe.weights": 5e-2,
        "moe.weights.rms": 1e-2,
        "moe.routing": 0.005,
        "moe.near_tie": 1e-2,
        "logits.kl": 1e-3,
        "logits.top1": 0.01,
        "logits.cross_entropy": 2e-3,
    },
    "bfloat16": {
        "output": 8e-2,
        "output.rms": 1.6e-2,
        "moe.output": 2e-1,
        "moe.output.rms": 4e-2,
        "moe.outlier": 100.0,
        "moe.weights": 3e-1,
        "moe.weights.rms": 6e-2,
        "moe.routing": 0.02,
        "moe.near_tie": 6e-2,
        "logits.kl": 2e-2,
        "logits.top1": 0.03,
        "logits.cross_entropy": 1e-2,
    },
}


_QUANTIZED: dict[str, dict[str, float]] = {
    "int8": {
        "output": 2e-2,
        "output.rms": 4e-3,
        "moe.output": 1e-1,
        "moe.output.rms": 2e-2,
        "moe.outlier": 100.0,
        "moe.weights": 3e-1,
        "moe.weights.rms": 2e-2,
        "moe.routing": 0.01,
        AGREEMENT: 0.01,
        EXPERT: 2.0,
        "moe.near_tie": 3e-2,
        "logits.kl": 2e-3,
        "logits.top1": 0.02,
        "logits.cross_entropy": 1e-2,
    },
    "int4": {
        "output": 2e-1,
        "output.rms": 5e-2,
        "moe.output": 8e-1,
        "moe.output.rms": 2e-1,
        "moe.outlier": 100.0,
        "moe.weights": 8e-1,
        "moe.weights.rms": 1.5e-1,
        "moe.routing": 0.05,
        AGREEMENT: 0.08,
        EXPERT: 2.0,
        "moe.near_tie": 1.5e-1,
        "logits.kl": 4e-2,
        "logits.top1": 0.05,
        "logits.cross_entropy": 6e-2,
    },
}
"""Engines with quantised experts; each limit is the larger one of these and of the dtype's."""
_WHY_QUANTIZED = {
    "int8": "weights in blocks of 32 are off by 0.5 % (root mean square), QMoE's int8 activations by as "
    "much, a layer's output by 0.8 %; the limits are two to four times what the shipped model measures",
    "int4": "weights in blocks of 32 are off by 8.6 % (root mean square), a layer's output by 11 %; "
    "the limits are two to four times what the shipped model measures",
}
_EVEN_EXPERTS = (
    "rounding is as large in one expert as in another: at most 1.2 times the median's on the shipped model, "
    "and 2.4 times with one expert's scales halved"
)
_DRIFT = "rounding of the experts below moves a layer's input, and with it choices between near experts"

FEW_TOKENS = 16
"""Under so many tokens a median says nothing."""


@dataclass(frozen=True)
class Limit:
    """The bound of one level: ``value``, what it ``measures``, why it is that large (``reason``)."""

    name: str
    value: float
    measures: str
    reason: str


@dataclass(frozen=True)
class Tolerances:
    """All limits of one verification, by name."""

    dtype: str
    limits: Mapping[str, Limit]
    quantization: str | None = None

    def __getitem__(self, name: str) -> Limit:
        return self.limits[name]

    def token_limit(self, errors: NDArray[np.float64]) -> float:
        """The largest error of a token among ``errors`` [T], which ``moe.output`` bounds.

        In low precision it is lower where the median token is much better: an engine that is nearly exact at
        most tokens may not be wrong at a few. It never is below what float32 allows.
        """
        import numpy as np

        limit = self["moe.output"].value
        if self.exact_routing or len(errors) < FEW_TOKENS:
            return limit
        even = self["moe.outlier"].value * float(np.median(errors))
        return min(limit, max(even, _DEFAULTS["float32"]["moe.output"]))

    @property
    def exact_routing(self) -> bool:
        """Whether a free run is expected to follow the reference's routing, so that its values can be
        judged."""
        return self.dtype == "float32" and self.quantization is None


def default_tolerances(
    dtype: str,
    outputs: Iterable[str],
    overrides: Mapping[str, float] | None = None,
    quantization: str | None = None,
) -> Tolerances:
    """Limits for an engine of ``dtype`` with these output names; ``overrides`` replaces single values.

    Names: an output (``logits``), ``<output>.rms``, or a level of :data:`LEVELS`; with ``quantization``
    (``int8``, ``int4``) those of :data:`QUANTIZED_LEVELS`, too.

    Raises:
        UsageError: unknown name, dtype or quantisation, or a value that is not a finite number of 0 or more.
    """
    if dtype not in _DEFAULTS:
        raise UsageError(f"no tolerances for dtype {dtype!r}; {choices_text(dtype, DTYPES)}")
    if quantization is not None and quantization not in _QUANTIZED:
        raise UsageError(
            f"no tolerances for quantisation {quantization!r}; {choices_text(quantization, _QUANTIZED)}"
        )
    values, why = _values(dtype, quantization), _why(dtype, quantization)
    levels = LEVELS if quantization is None else {**LEVELS, **QUANTIZED_LEVELS}
    limits: dict[str, Limit] = {}
    for output in outputs:
        limits[output] = Limit(output, values["output"], _OUTPUT, why)
        limits[f"{output}.rms"] = Limit(f"{output}.rms", values["output.rms"], _OUTPUT_RMS, why)
    for name, measures in levels.items():
        limits[name] = Limit(name, values[name], measures, _reason(name, dtype, quantization))
    for name, value in (overrides or {}).items():
        if name not in limits:
            raise UsageError(f"tolerance for unknown name {name!r}; {choices_text(name, limits)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"tolerance {name}: expected a number, got {value!r}")
        if not math.isfinite(value) or value < 0:
            raise UsageError(f"tolerance {name}: expected a finite number of 0 or more, got {value!r}")
        reason = f"set by the user (default {limits[name].value:g}: {limits[name].reason})"
        limits[name] = Limit(name, float(value), limits[name].measures, reason)
    return Tolerances(dtype, limits, quantization)


def _values(dtype: str, quantization: str | None) -> dict[str, float]:
    plain = _DEFAULTS[dtype]
    if quantization is None:
        return plain
    return {name: max(value, plain.get(name, 0.0)) for name, value in _QUANTIZED[quantization].items()}


def _why(dtype: str, quantization: str | None) -> str:
    return _WHY[dtype] if quantization is None else _WHY_QUANTIZED[quantization]


def _reason(name: str, dtype: str, quantization: str | None) -> str:
    if quantization is not None and name in ("moe.routing", AGREEMENT):
        return _DRIFT
    if name == EXPERT:
        return _EVEN_EXPERTS
    if name == "moe.routing":
        return _EXACT if dtype == "float32" else _FLIPS
    return _EVEN if name == "moe.outlier" else _why(dtype, quantization)
