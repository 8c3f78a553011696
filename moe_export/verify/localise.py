"""Names the first place where an engine diverges: layer, token, expert, and what kind of mistake it looks
like."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .agreement import place
from .blame import ExpertEvidence, blame_experts, blame_router
from .judge import JudgedRun
from .layers import LayerComparison, first_rows
from .result import CaseResult, Finding
from .tolerance import Tolerances

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AMPLIFIED = 5.0
"""An error this many times the error of the layer's input is the layer's own."""


def localise(
    runs: Sequence[JudgedRun], failed: Sequence[CaseResult], tolerances: Tolerances
) -> tuple[Finding, ...]:
    """Findings over all runs, the earliest divergence first.

    ``failed`` are cases that gave no run (the engine or the reference raised). Runs that passed are evidence
    too: their tokens acquit experts, and a mistake that shows in chunked or padded runs only is named so.
    """
    located = [(run, _locate(run, tolerances)) for run in runs]
    found = [(run, finding) for run, finding in located if finding is not None]
    plain = [
        f for run, f in found if f.kind == "before the MoE" and not {"padded", "chunked"} & set(run.case.tags)
    ]
    chunked_only = [f for run, f in found if _is(run, chunked=True, padded=False)]
    groups: dict[tuple[str, int | None], list[tuple[JudgedRun, Finding]]] = {}
    for run, finding in found:
        named = _by_pattern(run, finding, plain, chunked_only)
        groups.setdefault((named.kind, named.layer), []).append((run, named))
    findings = [_merge(members, located, tolerances) for members in groups.values()]
    findings.sort(key=lambda f: (f.layer is None, f.layer or 0, -len(f.cases)))
    return (*_errors(failed), *findings)


def _is(run: JudgedRun, *, chunked: bool, padded: bool) -> bool:
    return ("chunked" in run.case.tags) == chunked and ("padded" in run.case.tags) == padded


def _errors(failed: Sequence[CaseResult]) -> list[Finding]:
    groups: dict[str, list[CaseResult]] = {}
    for case in failed:
        groups.setdefault(case.error, []).append(case)
    out = []
    for error, cases in groups.items():
        kind = "reference" if error.startswith("reference") else "engine error"
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in cases[0].inputs.items())
        out.append(Finding(kind, f"{error} (inputs: {shapes})", tuple(c.name for c in cases)))
    return out


def _by_pattern(
    run: JudgedRun, finding: Finding, plain: Sequence[Finding], chunked_only: Sequence[Finding]
) -> Finding:
    """Rename a wrong layer input that no plain run shows: it is the cache's or the mask's doing."""
    if finding.kind != "before the MoE" or any((f.layer or 0) <= (finding.layer or 0) for f in plain):
        return finding
    padded, chunked = "padded" in run.case.tags, "chunked" in run.case.tags
    where = place(finding.batch, finding.position, finding.token)
    where = f"layer {finding.layer} ({finding.layer_name}), {where}"
    if chunked and (not padded or chunked_only):
        first = run.case.chunks[0]
        text = (
            f"the input of {where} is wrong only when tokens come in pieces (first piece: {first}): "
            "cached keys, values or states, or positions and mask after the first piece, are wrong"
        )
        return dataclasses.replace(finding, kind="KV cache", message=text)
    if padded:
        text = f"the input of {where} is wrong only with padding: attention mask, or positions made from it"
        return dataclasses.replace(finding, kind="attention mask", message=text)
    return finding


def _merge(
    members: Sequence[tuple[JudgedRun, Finding]],
    located: Sequence[tuple[JudgedRun, Finding | None]],
    tolerances: Tolerances,
) -> Finding:
    """One finding for all runs that show the same kind in the same layer; experts are named from all their
    tokens."""
    run, finding = max(members, key=lambda m: max((c.result.tokens for c in m[0].layers), default=0))
    cases = tuple(dict.fromkeys(r.case.name for r, _ in members))
    if finding.kind != "wrong expert" or finding.layer is None:
        return dataclasses.replace(finding, cases=cases)
    limit = tolerances["moe.output"].value
    parts = []
    for other, theirs in located:
        if other.result.mode == "free" and not tolerances.exact_routing:
            continue
        clean = theirs is None or (theirs.layer is not None and theirs.layer >= finding.layer)
        for comparison in other.layers:
            if clean and comparison.layer.index == finding.layer:
                parts.append(_evidence(comparison, _own(comparison.output, comparison, limit)))
    experts, words = blame_experts(parts, limit)
    where = place(finding.batch, finding.position, finding.token)
    text = (
        f"layer {finding.layer} ({finding.layer_name}): input and routing agree, the output does not, "
        f"first at {where}: {words}"
    )
    return dataclasses.replace(finding, cases=cases, experts=experts, message=text)


def _locate(run: JudgedRun, tolerances: Tolerances) -> Finding | None:
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
    limit, rms = tolerances["moe.output"].value, tolerances["moe.output.rms"].value
    nothing = np.zeros(len(fair), bool)
    hidden_bad = _bad(comparison.hidden, fair, limit, rms) if values else nothing
    if hidden_bad.any():
        return _before(run, comparison, position, hidden_bad)
    logits_bad, output_bad = nothing, nothing
    if values:
        if comparison.logits is not None:
            logits_bad = _bad(comparison.logits, fair, limit, rms)
        output_bad = _bad(comparison.output, fair, limit, rms)
        own = _own(comparison.output, comparison, 0.0) & output_bad
        if comparison.logits is not None:
            own |= _own(comparison.logits, comparison, 0.0) & logits_bad
        if (logits_bad | output_bad).any() and not own.any():
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


def _own(errors: NDArray[np.float64], comparison: LayerComparison, limit: float) -> NDArray[np.bool_]:
    """Tokens over the limit whose error the layer's input does not explain."""
    return (errors > limit) & (errors > _AMPLIFIED * comparison.hidden) & ~comparison.after_tie


def _evidence(comparison: LayerComparison, bad: NDArray[np.bool_]) -> ExpertEvidence:
    import numpy as np

    keep = ~comparison.after_tie & comparison.routing.same
    shown = np.flatnonzero(keep & bad)
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
    experts, words = blame_experts([_evidence(comparison, bad)], limit)
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
