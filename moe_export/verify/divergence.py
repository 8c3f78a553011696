"""Where one run diverges first: layer, token, and what kind of mistake it looks like."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .agreement import place
from .blame import ExpertEvidence, blame_experts, blame_router
from .judge import JudgedRun
from .layers import LayerComparison, first_rows
from .result import Finding
from .tolerance import Tolerances

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AMPLIFIED = 5.0
"""An error this many times the error of the layer's input is the layer's own."""


def locate(run: JudgedRun, tolerances: Tolerances) -> Finding | None:
    """The first divergence of one run, or None when every judged check passed."""
    if run.result.passed:
        return None
    for error in (r for r in run.result.layers if r.problem):
        return Finding(
            "shape", f"layer {error.index} ({error.name}): {error.problem}", (run.case.name,), error.index
        )
    values = run.result.mode == "forced" or tolerances.exact_routing
    for position, comparison in enumerate(run.layers):
        finding = _in_layer(run, comparison, position, tolerances, values)
        if finding is not None:
            return finding
    return _after_layers(run)


def _in_layer(
    run: JudgedRun, comparison: LayerComparison, position: int, tolerances: Tolerances, values: bool
) -> Finding | None:
    import numpy as np

    fair = ~comparison.after_tie
    rms = tolerances["moe.output.rms"].value
    nothing = np.zeros(len(fair), bool)
    hidden_bad = (
        _bad(comparison.hidden, fair, tolerances.token_limit(comparison.hidden[fair]), rms)
        if values
        else nothing
    )
    if hidden_bad.any():
        return _before(run, comparison, position, hidden_bad)
    logits_bad, output_bad, limit = nothing, nothing, tolerances["moe.output"].value
    if values:
        if comparison.logits is not None:
            logits_bad = _bad(comparison.logits, fair, tolerances.token_limit(comparison.logits[fair]), rms)
        limit = tolerances.token_limit(comparison.output[fair])
        output_bad = _bad(comparison.output, fair, limit, rms)
        mine = own_error(comparison.output, comparison, 0.0) & output_bad
        if comparison.logits is not None:
            mine |= own_error(comparison.logits, comparison, 0.0) & logits_bad
        if (logits_bad | output_bad).any() and not mine.any():
            return _before(run, comparison, position, logits_bad | output_bad)
    if run.result.mode == "free" or logits_bad.any():
        blame = blame_router(
            comparison, fair, *_routing_faults(comparison, fair, tolerances), logits_bad=logits_bad
        )
        if blame is not None and (run.result.mode == "free" or blame.kind == "wrong router"):
            return _finding(run, comparison, blame.kind, blame.words, blame.tokens)
    if output_bad.any():
        return _wrong_output(run, comparison, output_bad, limit)
    return None


def _routing_faults(
    comparison: LayerComparison, fair: NDArray[np.bool_], tolerances: Tolerances
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tokens with unexplained experts and tokens with wrong weights, each as far as it is over its limit."""
    import numpy as np

    routing = comparison.routing
    unexplained = routing.unexplained & fair
    if not fair.any() or float(unexplained.sum()) <= tolerances["moe.routing"].value * len(fair):
        unexplained = np.zeros(len(fair), bool)
    judged = routing.weights_judged & fair
    errors = np.where(judged, np.nan_to_num(routing.weight_error, nan=0.0, posinf=np.inf), 0.0)
    weights = _bad(errors, judged, tolerances["moe.weights"].value, tolerances["moe.weights.rms"].value)
    return unexplained, weights


def _bad(errors: NDArray[np.float64], fair: NDArray[np.bool_], limit: float, rms: float) -> NDArray[np.bool_]:
    """Tokens over the limit; when only the root mean square is over its limit, the tokens that make it so."""
    import numpy as np

    bad = (errors > limit) & fair
    if not bad.any() and fair.any() and float(np.sqrt(np.mean(errors[fair] ** 2))) > rms:
        bad = (errors > rms) & fair
    return bad


def own_error(errors: NDArray[np.float64], comparison: LayerComparison, limit: float) -> NDArray[np.bool_]:
    """Tokens over the limit whose error the layer's input does not explain."""
    return (errors > limit) & (errors > _AMPLIFIED * comparison.hidden) & ~comparison.after_tie


def evidence(comparison: LayerComparison, bad: NDArray[np.bool_]) -> ExpertEvidence:
    """What a layer's tokens say about its experts; outputs are left out where a light run has none."""
    import numpy as np

    keep = ~comparison.after_tie & comparison.routing.same
    full = len(comparison.engine.output) == len(keep)
    shown = np.flatnonzero(keep & bad & full)
    return ExpertEvidence(
        comparison.reference.expert_ids[keep],
        np.asarray(comparison.reference.weights[keep], np.float64),
        bad[keep],
        np.asarray(comparison.engine.output[shown], np.float64),
        np.asarray(comparison.reference.output[shown], np.float64),
    )


def _before(run: JudgedRun, comparison: LayerComparison, position: int, bad: NDArray[np.bool_]) -> Finding:
    after = (
        f"the output of {run.layers[position - 1].layer.name} agrees"
        if position
        else "no MoE layer comes before"
    )
    first = _first_of_sequence(comparison)
    hint = "attention, positions (RoPE), norms, shared experts or projections in between are wrong"
    if first is not None and bad.any() and (first & ~comparison.after_tie).any():
        if not (first & bad).any():
            hint = (
                "the first token of each sequence agrees and later ones do not, so attention mixes positions "
                "wrongly: RoPE, mask, keys or values"
            )
        elif (bad & ~first).any() or not (~first).any():
            hint = (
                "the first token of a sequence is wrong too, so it is not just how attention mixes tokens: "
                "embedding, norm, projection or shared-expert weights"
            )
    words = f"the layer's input is already wrong at {int(bad.sum())} token(s) while {after}: {hint}"
    return _finding(run, comparison, "before the MoE", words, bad)


def _first_of_sequence(comparison: LayerComparison) -> NDArray[np.bool_] | None:
    import numpy as np

    seen: set[int] = set()
    out = np.zeros(len(comparison.coordinates), bool)
    for t, (_row, batch, position) in enumerate(comparison.coordinates):
        if batch is None or position is None:
            return None
        out[t] = batch not in seen
        seen.add(batch)
    return out


def _wrong_output(
    run: JudgedRun, comparison: LayerComparison, bad: NDArray[np.bool_], limit: float
) -> Finding:
    import numpy as np

    engine, reference = comparison.engine.output, comparison.reference.output
    zero = bad & (np.abs(engine).max(axis=1) == 0) & (np.abs(reference).max(axis=1) > 0)
    if zero.any() and (zero == bad).all():
        words = f"{int(zero.sum())} token(s) get no expert output (all zeros) although routing is right"
        return _finding(run, comparison, "dropped token", words, zero)
    experts, words = blame_experts([evidence(comparison, bad)], limit)
    text = f"input and routing agree, the output does not: {words}"
    return dataclasses.replace(_finding(run, comparison, "wrong expert", text, bad), experts=experts)


def _finding(
    run: JudgedRun, comparison: LayerComparison, kind: str, words: str, bad: NDArray[np.bool_]
) -> Finding:
    import numpy as np

    token, batch, position = first_rows(comparison, bad)
    layer = comparison.layer
    worst = np.concatenate([comparison.hidden[bad], comparison.output[bad]])
    if run.result.mode == "free":
        worst = np.concatenate(
            [worst, np.nan_to_num(comparison.routing.weight_error[bad], nan=0.0, posinf=np.inf)]
        )
    if not np.isfinite(worst).all():
        lost = not (
            np.isfinite(comparison.reference.hidden).all() and np.isfinite(comparison.reference.output).all()
        )
        kind = "reference" if lost else "not a number"
        words = f"{'the source model itself gives ' if lost else ''}NaN or infinity; {words}"
    text = f"layer {layer.index} ({layer.name}), first at {place(batch, position, token)}: {words}"
    return Finding(
        kind=kind,
        message=text,
        cases=(run.case.name,),
        layer=layer.index,
        layer_name=layer.name,
        token=token,
        batch=batch,
        position=position,
    )


def _after_layers(run: JudgedRun) -> Finding | None:
    if not run.twin_agrees:
        text = (
            "the engine as users run it gives wrong outputs, the same engine with its routing shown does "
            "not: an optimisation of the runtime or a fused kernel is wrong"
        )
        return Finding("optimised engine", text, (run.case.name,))
    for check in run.result.failures:
        error = run.result.outputs.get(check.subject)
        if error is None:
            continue
        kind = "after the MoE" if run.layers else "dense"
        if error.problem:
            kind = "shape"
        elif error.nonfinite:
            kind = "not a number"
        agree = "every MoE layer agrees, but " if run.layers else ""
        index = error.worst.index if error.worst is not None else ()
        return Finding(
            kind=kind,
            message=f"{agree}output {check.subject!r} is wrong: {error.problem or check.detail}",
            cases=(run.case.name,),
            batch=index[0] if len(index) > 1 else None,
            position=index[1] if len(index) > 2 else None,
        )
    names = ", ".join(f"{c.level} of {c.subject}" for c in run.result.failures)
    return Finding("after the MoE", f"no token stands out, but over its limit: {names}", (run.case.name,))
