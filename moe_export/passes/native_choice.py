"""Which native lowering a layer's experts get: predicted times of all, by the cost model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..costs.moe_kernels import (
    GATHER_TOKENS,
    MoeShapes,
    gpu_for,
    predict_layer,
    refusals,
)
from ..schema import Alternative
from .native_text import NativeForm

TOKENS = (1, 16, 512)
"""One decoded token, a batch of them, a prompt."""
DENSE_WASTE = 2.0
"""E/K below which computing every expert on every token wastes less than buckets leave empty."""
DEFAULT_SM = 89


@dataclass(frozen=True)
class Choice:
    """``lowering``: of :data:`native_text.LOWERINGS`. ``threshold``: tokens up to which ``both`` gathers."""

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
    )


@lru_cache(maxsize=4096)
def _seconds(shapes: MoeShapes, lowering: str, sm: int) -> float:
    return predict_layer(shapes, sm, lowering).seconds


def threshold_of(form: NativeForm, sm: int) -> int:
    """Tokens up to which gathering is predicted to be no slower than buckets; 1 or more.

    Near E/K: there the assignments read as many matrices as there are experts. Never beyond what TensorRT
    was seen to fuse.
    """
    most = max(GATHER_TOKENS, form.experts // form.top_k)
    few = [
        t
        for t in range(1, most + 1)
        if _seconds(shapes_of(form, t), "gather", sm) <= _seconds(shapes_of(form, t), "buckets", sm)
    ]
    return max(few, default=1)


def choose(form: NativeForm, wanted: str, sms: Iterable[int], max_tokens: int | None) -> Choice:
    """The lowering of one layer for engines of ``sms`` that take at most ``max_tokens`` (None: any number).

    ``wanted``: ``auto``, or one of :data:`native_text.LOWERINGS` to force it.
    """
    sm = next(iter(sms), DEFAULT_SM)
    threshold = threshold_of(form, sm)
    lowering = wanted if wanted != "auto" else _best(form, threshold, max_tokens)
    reason = _reason(form, lowering, threshold, max_tokens) if wanted == "auto" else "asked for"
    notes = {
        "gather": f"slower above {threshold} tokens: each assignment reads its expert's matrices again",
        "buckets": f"slower up to {threshold} tokens: it reads every expert's matrices, used or not",
        "both": _why_not_both(form, threshold, max_tokens),
        "dense": f"computes every expert on every token, {form.experts / form.top_k:.3g} times the work",
    }
    others = [
        Alternative(f"native: {name}", f"{note}; {_times(form, name, threshold, sm)}")
        for name, note in notes.items()
        if name != lowering
    ]
    others.append(Alternative("GPU plugin ExpertMLP", _plugin(form, sm)))
    others.append(Alternative("TRT_MoE", _trt_moe(form, sm)))
    times = f"{_times(form, lowering, threshold, sm)} on {gpu_for(sm).title}"
    return Choice(lowering, threshold, f"{reason}; {times}", tuple(others))


def _best(form: NativeForm, threshold: int, max_tokens: int | None) -> str:
    if form.experts / form.top_k < DENSE_WASTE:
        return "dense"
    return "gather" if max_tokens is not None and max_tokens <= threshold else "both"


def _reason(form: NativeForm, lowering: str, threshold: int, max_tokens: int | None) -> str:
    if lowering == "dense":
        return f"a token uses {form.top_k} of {form.experts} experts, so buckets would save too little"
    if lowering == "gather":
        return f"the engine takes at most {max_tokens} tokens, and gathering is for up to {threshold}"
    return (
        f"few tokens read only the experts they use, many tokens fill buckets; one engine holds both, with "
        f"one copy of the weights, and chooses at {threshold} tokens by itself (E/K is "
        f"{form.experts / form.top_k:.3g})"
    )


def _why_not_both(form: NativeForm, threshold: int, max_tokens: int | None) -> str:
    if form.experts / form.top_k < DENSE_WASTE:
        return f"buckets need a size from the host and save at most {form.experts / form.top_k:.3g} times"
    if max_tokens is not None and max_tokens <= threshold:
        return f"no run has more than {max_tokens} tokens, so the buckets would never be used"
    return "was not asked for"


def _times(form: NativeForm, lowering: str, threshold: int, sm: int) -> str:
    def at(tokens: int) -> float:
        name = lowering
        if lowering == "both":
            name = "gather" if tokens <= threshold else "buckets"
        return _seconds(shapes_of(form, tokens), name, sm)

    parts = ", ".join(f"{at(t) * 1e3:.3g} ms at T={t}" for t in TOKENS)
    return f"predicted, not measured: {parts}"


def _plugin(form: NativeForm, sm: int) -> str:
    refused = refusals(shapes_of(form, 1), sm).get("plugin")
    if refused:
        return refused
    return f"needs expert_lowering = plugin, and its library beside the plan; {_times(form, 'plugin', 0, sm)}"


def _trt_moe(form: NativeForm, sm: int) -> str:
    refused = refusals(shapes_of(form, 1), sm).get("trt_moe")
    if refused:
        return refused
    return f"cannot be built where moe-export is tested, so never checked; {_times(form, 'trt_moe', 0, sm)}"
