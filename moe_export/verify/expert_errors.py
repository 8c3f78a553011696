"""Errors by expert, over all cases with routing forced: an expert that is much worse than the others is
broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .judge import JudgedRun
from .result import Finding
from .tolerance import EXPERT, FEW_TOKENS, Tolerances

if TYPE_CHECKING:
    from ..schema import Manifest


class ExpertErrors:
    """Root mean square error of each expert's tokens, each token counted by its weight for that expert.

    Rounding to few bits is as large in one expert as in another, so where it is wide (int4) a broken expert
    shows in comparison with its layer's other experts long before it leaves the limits of ``moe.output``.
    """

    def __init__(self, manifest: Manifest) -> None:
        import numpy as np

        self._layers = manifest.moe_layers
        self._errors = {m.index: np.zeros(m.num_experts) for m in self._layers}
        self._shares = {m.index: np.zeros(m.num_experts) for m in self._layers}
        self._tokens = {m.index: np.zeros(m.num_experts, np.int64) for m in self._layers}

    def add(self, run: JudgedRun) -> None:
        """Count a run with forced routing; others say nothing, as their tokens' inputs differ."""
        import numpy as np

        if run.result.mode != "forced":
            return
        for comparison in run.layers:
            index = comparison.layer.index
            ids, weights = comparison.reference.expert_ids, comparison.reference.weights
            rows = np.isfinite(comparison.output)[:, None] & (ids >= 0) & (weights != 0)
            token, _ = np.nonzero(rows)
            share = weights[rows].astype(np.float64) ** 2
            np.add.at(self._errors[index], ids[rows], share * comparison.output[token] ** 2)
            np.add.at(self._shares[index], ids[rows], share)
            np.add.at(self._tokens[index], ids[rows], 1)

    def findings(self, tolerances: Tolerances) -> list[Finding]:
        """A finding for each layer with an expert beyond ``moe.expert`` times the (lower) median expert's
        error; empty for engines without quantised experts."""
        import numpy as np

        if EXPERT not in tolerances.limits:
            return []
        limit = tolerances[EXPERT]
        out = []
        for layer in self._layers:
            known = np.flatnonzero(self._tokens[layer.index] >= FEW_TOKENS)
            if len(known) < 2:
                continue
            rms = np.sqrt(self._errors[layer.index][known] / self._shares[layer.index][known])
            typical = max(float(np.sort(rms)[(len(rms) - 1) // 2]), 1e-12)
            wrong = np.flatnonzero(rms > limit.value * typical)
            if not len(wrong):
                continue
            worst = int(rms.argmax())
            experts = tuple(int(known[i]) for i in wrong)
            out.append(
                Finding(
                    "wrong expert",
                    f"layer {layer.index} ({layer.name}): with routing forced, the tokens of expert(s) "
                    f"{', '.join(map(str, experts))} are wrong by up to {rms[worst] / typical:.1f} times as "
                    f"much as those of the median expert; limit {limit.value:g} ({EXPERT}: {limit.reason})",
                    (),
                    layer=layer.index,
                    layer_name=layer.name,
                    experts=experts,
                )
            )
        return out
