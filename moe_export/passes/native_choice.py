"""Which native lowering a layer's experts get: predicted times of all, by the cost model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..costs import Assumptions, Gpu, Work, find_gpu, predict
from ..costs.buckets import uniform_load
from ..schema import Alternative
from .native_text import NativeForm

GPU_OF_SM = {
    75: "l4",
    80: "a100-80",
    86: "l4",
    89: "l40s",
    90: "h100",
    100: "b200",
    103: "b200",
    120: "rtx-5090",
    121: "rtx-5090",
}
"""A GPU of each SM whose data sheet the cost model has; of the nearest that it has where there is none."""
TOKENS = (1, 16, 512)
"""One decoded token, a batch of them, a prompt."""
LAUNCHES = {"gather": 4, "buckets": 14, "dense": 5}
"""Kernels per layer after TensorRT's fusions: an assumption."""
DENSE_WASTE = 2.0
"""E/K below which computing every expert on every token wastes less than buckets leave empty."""
MOST_THRESHOLD = 64


@dataclass(frozen=True)
class Choice:
    """``lowering``: of :data:`native_text.LOWERINGS`. ``threshold``: tokens up to which ``both`` gathers."""

    lowering: str
    threshold: int
    reason: str
    alternatives: tuple[Alternative, ...]


def seconds(form: NativeForm, lowering: str, tokens: int, gpu: Gpu) -> float:
    """*Predicted* time of one layer's experts."""
    wide = form.inner * (2 if form.attributes["gated"] else 1)
    per_expert = form.hidden * (wide + form.inner)
    each = 4 if form.dtype == "float32" else 2
    weight = 4 if form.weight_dtype == "float32" else 2
    width = 2 * form.hidden + wide + form.inner
    assignments = tokens * form.top_k
    if lowering == "gather":
        rows, matrices, compute = float(assignments), float(assignments), "float32"
    elif lowering == "buckets":
        rows = form.experts * uniform_load(tokens, form.top_k, form.experts)
        matrices, compute = float(form.experts), _compute(form.dtype)
    else:
        rows, matrices, compute = float(form.experts * tokens), float(form.experts), _compute(form.dtype)
    work = Work(
        flops=2.0 * rows * per_expert,
        weights=matrices * per_expert * weight,
        activations=(rows * width + 2.0 * assignments * form.hidden) * each,
    )
    return predict(work, gpu, compute, Assumptions(), LAUNCHES[lowering]).seconds


def _compute(dtype: str) -> str:
    return "float32" if dtype == "float32" else "bfloat16"


def threshold_of(form: NativeForm, gpu: Gpu) -> int:
    """Tokens up to which gathering is predicted to be no slower than buckets; 1 or more.

    Near E/K: there the assignments read as many matrices as there are experts.
    """
    few = [
        t
        for t in range(1, MOST_THRESHOLD + 1)
        if seconds(form, "gather", t, gpu) <= seconds(form, "buckets", t, gpu)
    ]
    return max(few, default=1)


def choose(form: NativeForm, wanted: str, sms: Iterable[int], max_tokens: int | None) -> Choice:
    """The lowering of one layer for engines of ``sms`` that take at most ``max_tokens`` (None: any number).

    ``wanted``: ``auto``, or one of :data:`native_text.LOWERINGS` to force it.
    """
    gpu = find_gpu(GPU_OF_SM.get(next(iter(sms), 89), "l40s"))
    threshold = threshold_of(form, gpu)
    lowering = wanted if wanted != "auto" else _best(form, threshold, max_tokens)
    reason = _reason(form, lowering, threshold, max_tokens) if wanted == "auto" else "asked for"
    shown = {name: _times(form, name, threshold, gpu) for name in ("gather", "buckets", "both", "dense")}
    notes = {
        "gather": f"slower above {threshold} tokens: each assignment reads its expert's matrices again",
        "buckets": f"slower up to {threshold} tokens: it reads every expert's matrices, used or not",
        "both": _why_not_both(form, threshold, max_tokens),
        "dense": f"computes every expert on every token, {form.experts / form.top_k:.3g} times the work",
    }
    others = [
        Alternative(f"native: {name}", f"{notes[name]}; {text}")
        for name, text in shown.items()
        if name != lowering
    ]
    return Choice(lowering, threshold, f"{reason}; {shown[lowering]}", tuple(others))


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


def _times(form: NativeForm, lowering: str, threshold: int, gpu: Gpu) -> str:
    def at(tokens: int) -> float:
        name = lowering
        if lowering == "both":
            name = "gather" if tokens <= threshold else "buckets"
        return seconds(form, name, tokens, gpu)

    parts = ", ".join(f"{at(t) * 1e3:.3g} ms at T={t}" for t in TOKENS)
    return f"predicted for {gpu.title}, not measured: {parts}"
