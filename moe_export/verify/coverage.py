"""Counts what a verification touched, so that a layer nobody compared cannot pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .judge import JudgedRun
from .result import Finding, LayerCoverage

if TYPE_CHECKING:
    from ..schema import Manifest


class Coverage:
    """Tokens and experts compared per MoE layer, over all cases."""

    def __init__(self, manifest: Manifest) -> None:
        self._layers = manifest.moe_layers
        self._routed = {m.index: 0 for m in self._layers}
        self._weights = {m.index: 0 for m in self._layers}
        self._used: dict[int, set[int]] = {m.index: set() for m in self._layers}
        self._free_runs = 0

    def add(self, run: JudgedRun) -> None:
        """Count one run. Routing counts in free runs only; experts count wherever they computed something."""
        self._free_runs += run.result.mode == "free"
        for comparison in run.layers:
            index = comparison.layer.index
            self._used[index].update(
                int(e) for e in set(comparison.reference.expert_ids.reshape(-1)) if e >= 0
            )
            if run.result.mode == "free":
                self._routed[index] += int((~comparison.routing.after_tie).sum())
                self._weights[index] += int(comparison.routing.weights_judged.sum())

    def layers(self) -> tuple[LayerCoverage, ...]:
        """Per layer what was compared."""
        return tuple(
            LayerCoverage(
                index=m.index,
                name=m.name,
                routed_tokens=self._routed[m.index],
                weight_tokens=self._weights[m.index],
                num_experts=m.num_experts,
                unused_experts=tuple(e for e in range(m.num_experts) if e not in self._used[m.index]),
            )
            for m in self._layers
        )

    def notes(self) -> list[str]:
        """Which layers have experts that no token reached: those experts' weights were not verified."""
        lacking = [c for c in self.layers() if c.unused_experts]
        if not lacking or not self._free_runs:
            return []
        parts = [f"layer {c.index}: {len(c.unused_experts)} of {c.num_experts}" for c in lacking[:8]]
        more = f", and {len(lacking) - 8} more layers" if len(lacking) > 8 else ""
        return [f"experts that no token of these inputs reached, so not verified: {', '.join(parts)}{more}"]

    def findings(self) -> list[Finding]:
        """A finding for each layer whose weights never could be compared although runs were made."""
        return [
            Finding(
                "not verified",
                f"layer {c.index} ({c.name}): routing weights could not be compared at any token, since no "
                "token chose the reference's experts",
                (),
                layer=c.index,
                layer_name=c.name,
            )
            for c in self.layers()
            if self._free_runs and not c.weight_tokens
        ]
