"""Which native lowering a layer's experts get: predicted times of all, by the cost model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..costs.moe_kernels import (
    GATHER_TOKENS,
    TRT_MOE_TOKENS,
    MoeShapes,
    gpu_for,
    predict_layer,
    refusals,
)
from ..errors import UsageError
from ..schema import Alternative
from . import trt_moe
from .native_text import NativeForm

TOKENS = (1, 16, 512)
"""One decoded token, a batch of them, a prompt."""
DENSE_WASTE = 2.0
"""E/K below which computing every expert on every token wastes less than buckets leave empty."""
DEFAULT_SM = 89
UNPROVEN = "not built where moe-export is tested, and not run on a GPU"


@dataclass(frozen=True)
class Choice:
    """``lowering``: of :data:`native_text.LOWERINGS`, or ``trt_moe``. ``threshold``: tokens up to which
    ``both`` gathers."""

    lowering: str
    threshold: int
    reason: str
    alternatives: tuple[Alternative, ...]


def shapes_of(form: NativeForm, tokens: int) -> MoeShapes:
    """The layer as the cost model takes it."""
    given = form.attributes
    return MoeShapes(
        tokens,
        form.experts,
        form.top_k,
        form.hidden,
        form.inner,
        bool(given["gated"]),
        form.computed,
        str(given["activation"]),
        bool(given["biased"]),
        form.routed_over,
    )


@lru_cache(maxsize=4096)
def _seconds(shapes: MoeShapes, lowering: str, sm: int) -> float:
    return predict_layer(shapes, sm, lowering).seconds


def threshold_of(form: NativeForm, sm: int) -> int:
    """Tokens up to which gathering is predicted to be no slower than buckets; 1 or more.

    Near E/K: there the assignments read as many matrices as there are experts. Never beyond what TensorRT
    was seen to fuse.
    """
    most = max(GATHER_TOKENS, int(form.spread))
    few = [
        t
        for t in range(1, most + 1)
        if _seconds(shapes_of(form, t), "gather", sm) <= _seconds(shapes_of(form, t), "buckets", sm)
    ]
    return max(few, default=1)


def choose(form: NativeForm, wanted: str, sms: Iterable[int], max_tokens: int | None) -> Choice:
    """The lowering of one layer for engines of ``sms`` that take at most ``max_tokens`` (None: any number).

    ``wanted``: ``auto``, or one of :data:`native_text.LOWERINGS` or ``trt_moe`` to force it. ``auto`` takes
    ``trt_moe`` where the layer fits its limits on every SM and it is predicted the fastest for every number
    of tokens that the engine takes.

    Raises:
        UsageError: ``trt_moe`` is forced and the layer or an SM is beyond its limits.
    """
    known = tuple(sms)
    sm = next(iter(known), DEFAULT_SM)
    threshold = threshold_of(form, sm)
    problem = trt_moe.problem(form, known)
    if wanted == trt_moe.LOWERING and problem:
        raise UsageError(
            f"native_lowering: trt_moe is not for layer {form.attributes['layer']!r}: {problem}; take auto"
        )
    lowering = wanted
    if wanted == "auto":
        lowering = _best(form, threshold, max_tokens)
        if not problem and _fastest(form, lowering, threshold, max_tokens, sm):
            lowering = trt_moe.LOWERING
    reason = _reason(form, lowering, threshold, max_tokens) if wanted == "auto" else "asked for"
    if lowering == trt_moe.LOWERING:
        reason += f"; {UNPROVEN}"
    notes = {
        "gather": f"slower above {threshold} tokens: each assignment reads its expert's matrices again",
        "buckets": f"slower up to {threshold} tokens: it reads every expert's matrices, used or not",
        "both": _why_not_both(form, threshold, max_tokens),
        "dense": f"computes every expert on every token, {form.spread:.3g} times the work",
    }
    others = [
        Alternative(f"native: {name}", f"{note}; {_times(form, name, threshold, sm)}")
        for name, note in notes.items()
        if name != lowering
    ]
    others.append(Alternative("GPU plugin ExpertMLP", _plugin(form, sm)))
    if lowering != trt_moe.LOWERING:
        others.append(Alternative("TRT_MoE", _trt_moe(form, problem, max_tokens, sm)))
    times = f"{_times(form, lowering, threshold, sm)} on {gpu_for(sm).title}"
    return Choice(lowering, threshold, f"{reason}; {times}", tuple(others))


def _best(form: NativeForm, threshold: int, max_tokens: int | None) -> str:
    if form.spread < DENSE_WASTE:
        return "dense"
    return "gather" if max_tokens is not None and max_tokens <= threshold else "both"


def _fastest(form: NativeForm, other: str, threshold: int, max_tokens: int | None, sm: int) -> bool:
    """Whether TRT_MoE is predicted faster than ``other`` for every number of tokens that the engine takes."""
    if max_tokens is None or max_tokens > TRT_MOE_TOKENS:
        return False
    return all(
        _seconds(shapes_of(form, t), trt_moe.LOWERING, sm) < _at(form, other, threshold, t, sm)
        for t in range(1, max_tokens + 1)
    )


def _reason(form: NativeForm, lowering: str, threshold: int, max_tokens: int | None) -> str:
    if lowering == trt_moe.LOWERING:
        return f"the engine takes at most {max_tokens} tokens, and it is predicted the fastest for all"
    if lowering == "dense":
        return f"a token uses {form.top_k} of {form.everywhere} experts, so buckets would save too little"
    if lowering == "gather":
        return f"the engine takes at most {max_tokens} tokens, and gathering is for up to {threshold}"
    return (
        f"few tokens read only the experts they use, many tokens fill buckets; one engine holds both, with "
        f"one copy of the weights, and chooses at {threshold} tokens by itself (E/K is "
        f"{form.spread:.3g})"
    )


def _why_not_both(form: NativeForm, threshold: int, max_tokens: int | None) -> str:
    if form.spread < DENSE_WASTE:
        return f"buckets need a size from the host and save at most {form.spread:.3g} times"
    if max_tokens is not None and max_tokens <= threshold:
        return f"no run has more than {max_tokens} tokens, so the buckets would never be used"
    return "was not asked for"


def _times(form: NativeForm, lowering: str, threshold: int, sm: int) -> str:
    parts = ", ".join(f"{_at(form, lowering, threshold, t, sm) * 1e3:.3g} ms at T={t}" for t in TOKENS)
    return f"predicted, not measured: {parts}"


def _at(form: NativeForm, lowering: str, threshold: int, tokens: int, sm: int) -> float:
    """Predicted seconds; ``both`` is the one of its two that runs."""
    name = lowering
    if lowering == "both":
        name = "gather" if tokens <= threshold else "buckets"
    return _seconds(shapes_of(form, tokens), name, sm)


def _plugin(form: NativeForm, sm: int) -> str:
    refused = refusals(shapes_of(form, 1), sm).get("plugin")
    if refused:
        return refused
    return f"needs expert_lowering = plugin, and its library beside the plan; {_times(form, 'plugin', 0, sm)}"


def _trt_moe(form: NativeForm, problem: str, max_tokens: int | None, sm: int) -> str:
    if problem:
        return problem
    times = _times(form, trt_moe.LOWERING, 0, sm)
    if max_tokens is None or max_tokens > TRT_MOE_TOKENS:
        slow = f"slow for more than {TRT_MOE_TOKENS} tokens, and a run may have "
        slow += "any number" if max_tokens is None else str(max_tokens)
        return f"{slow}; native_lowering = trt_moe takes it; {UNPROVEN}; {times}"
    return f"not predicted to be the fastest; {UNPROVEN}; {times}"
