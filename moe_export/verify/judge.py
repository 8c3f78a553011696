"""Holds one run against the reference: numbers, limits, verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .inputs import Case, valid_masks
from .layer_checks import broken_layer, layer_checks
from .layers import LayerComparison, compare_layers
from .output_checks import output_checks
from .result import CaseResult, Check
from .tolerance import Tolerances

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Manifest
    from ..trace import TracedRun


@dataclass(frozen=True)
class JudgedRun:
    """A case's verdict and the arrays it came from, for localisation."""

    case: Case
    result: CaseResult
    layers: tuple[LayerComparison, ...]
    undecided: bool = False
    """Whether some token's choice hangs on rounding, so that two builds of one engine may differ there."""
    twin_agrees: bool = True
    """False: the engine as users run it fails on outputs that pass when its routing is shown."""

    @property
    def tie_flipped(self) -> bool:
        """Whether a proven near tie went the other way somewhere in this run."""
        return any(bool(layer.routing.near_tie.any()) for layer in self.layers)

    def light(self) -> JudgedRun:
        """The same without the large arrays; enough to acquit experts."""
        return dataclasses.replace(self, layers=tuple(layer.light() for layer in self.layers))


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
    checks, outputs, logit_error = output_checks(
        case, forced, engine.outputs, reference, manifest, tolerances, excuse
    )
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
        checks=fold(checks),
        outputs=outputs,
        logits=logit_error,
        layers=tuple(layers),
    )
    undecided = any(bool(c.undecided.any()) for c in comparisons)
    return JudgedRun(case, result, tuple(comparisons), undecided)


def judge_plain(
    run: JudgedRun,
    plain: Mapping[str, NDArray[Any]],
    reference: TracedRun,
    manifest: Manifest,
    tolerances: Tolerances,
) -> JudgedRun:
    """Judge the outputs of the engine as users run it in place of those of its traced twin.

    The twin shows its routing, so the optimiser may have built it differently. Where the twin passes and the
    plain engine fails, the twin's outputs stay judged only if some choice of experts hangs on rounding.
    """
    result = run.result
    tie = run.tie_flipped
    excuse = _excuse(False, tie, bool(manifest.moe_layers), tolerances)
    checks, outputs, logits = output_checks(run.case, False, plain, reference, manifest, tolerances, excuse)
    mine = {c.level for c in checks}
    others = [c for c in result.checks if c.level not in mine]
    twin_passed = all(c.passed or not c.judged for c in result.checks if c.level in mine)
    passed = all(c.passed or not c.judged for c in checks)
    if twin_passed and not passed and run.undecided:
        note = "a tie that rounding decides went another way than in the traced engine; judged there"
        checks = [dataclasses.replace(c, judged=False, reason=note) for c in checks]
        checks += [c for c in result.checks if c.level in mine]
        passed = True
    return dataclasses.replace(
        run,
        twin_agrees=passed or not twin_passed,
        result=dataclasses.replace(
            result,
            checks=(*checks, *others),
            passed=all(c.passed or not c.judged for c in (*checks, *others)),
            outputs=outputs,
            logits=logits,
        ),
    )


def fold(checks: Sequence[Check]) -> tuple[Check, ...]:
    """Every failing check, and of each level that has none the nearest to its limit (over all layers).

    What is not judged is folded in the same way. All numbers of all layers stay in the case's layer results.
    """
    groups: dict[tuple[str, bool], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.level, check.judged), []).append(check)
    out: list[Check] = []
    for (_level, judged), group in groups.items():
        failing = [c for c in group if not c.passed]
        if failing and judged:
            out += failing
            continue
        worst = max(group, key=lambda c: math.inf if c.value is None else c.value / max(c.limit, 1e-300))
        detail = f"worst of {len(group)}: {worst.detail}" if len(group) > 1 else worst.detail
        out.append(dataclasses.replace(worst, detail=detail))
    return tuple(out)


def _excuse(forced: bool, tie: bool, has_moe: bool, tolerances: Tolerances) -> str:
    """Why values of this run are not judged; empty when they are."""
    if forced or not has_moe:
        return ""
    if not tolerances.exact_routing:
        return "a flipped near tie changes values; they are judged with routing forced"
    return "a proven near tie flipped in this run; values are judged with routing forced" if tie else ""
