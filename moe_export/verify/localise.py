"""Names the first place where an engine diverges: layer, token, expert, and what kind of mistake it looks
like."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .agreement import place
from .blame import blame_experts
from .divergence import evidence, locate, own_error
from .judge import JudgedRun
from .result import CaseResult, Finding
from .tolerance import Tolerances


def localise(
    runs: Sequence[JudgedRun], failed: Sequence[CaseResult], tolerances: Tolerances
) -> tuple[Finding, ...]:
    """Findings over all runs, the earliest divergence first.

    ``failed`` are cases that gave no run (the engine or the reference raised). Runs that passed are evidence
    too: their tokens acquit experts, and a mistake that shows in chunked or padded runs only is named so.
    """
    located = [(run, locate(run, tolerances)) for run in runs]
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
    """One finding for all runs that show this kind in this layer; their tokens together name the experts."""
    run, finding = max(members, key=lambda m: max((c.result.tokens for c in m[0].layers), default=0))
    cases = tuple(dict.fromkeys(r.case.name for r, _ in members))
    if finding.kind != "wrong expert" or finding.layer is None:
        return dataclasses.replace(finding, cases=cases)
    comparisons = []
    for other, theirs in located:
        clean = theirs is None or (theirs.layer is not None and theirs.layer >= finding.layer)
        if clean and (other.result.mode == "forced" or tolerances.exact_routing):
            comparisons += [c for c in other.layers if c.layer.index == finding.layer]
    # The strictest limit of all runs: a small run's wide one must not acquit an expert.
    limit = min(tolerances.token_limit(c.output[~c.after_tie]) for c in comparisons)
    experts, words = blame_experts([evidence(c, own_error(c.output, c, limit)) for c in comparisons], limit)
    where = place(finding.batch, finding.position, finding.token)
    text = (
        f"layer {finding.layer} ({finding.layer_name}): input and routing agree, the output does not, "
        f"first at {where}: {words}"
    )
    return dataclasses.replace(finding, cases=cases, experts=experts, message=text)
