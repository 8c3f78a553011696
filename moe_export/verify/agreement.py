"""Routing agreement of one layer as numbers for a report: counts, first differences, worst weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..trace import LayerTrace
    from .routing import TokenRouting

MAX_EXAMPLES = 8


@dataclass(frozen=True)
class RoutingDifference:
    """One token whose experts differ. ``token``: row of the layer; ``batch``, ``position``: where known.

    ``kind``: ``near tie``, ``after a tie`` (an earlier tie already changed this token's input),
    ``unexplained``. ``gap``: by how much (in router logits) the reference preferred its expert; ``bound``:
    what the dtype explains.
    """

    token: int
    batch: int | None
    position: int | None
    kind: str
    engine: tuple[int, ...]
    reference: tuple[int, ...]
    gap: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class WeightDifference:
    """The token whose weights differ most, both sides in the order of ``experts``. None: not finite."""

    token: int
    batch: int | None
    position: int | None
    experts: tuple[int, ...]
    engine: tuple[float | None, ...]
    reference: tuple[float | None, ...]

    def text(self) -> str:
        """``batch 0, position 3: experts [1, 2] got [0.4, 0.6], reference [0.5, 0.5]``."""
        got, want = _numbers(self.engine), _numbers(self.reference)
        where = place(self.batch, self.position, self.token)
        return f"{where}: experts {list(self.experts)} got {got}, reference {want}"


@dataclass(frozen=True)
class RoutingAgreement:
    """Counts over the compared tokens of one layer.

    ``same_sets`` ignores the order of a token's experts, ``same_order`` does not. Each token whose set
    differs is in exactly one of ``near_ties``, ``after_ties``, ``unexplained``; ``dropped_differ`` of them
    drop another number of assignments. Weights are compared on ``weight_tokens`` tokens with equal sets,
    aligned by expert and relative to the token's largest weight. ``margin`` says how near ties were proven,
    or why none can be.
    """

    tokens: int
    same_sets: int
    same_order: int
    near_ties: int
    after_ties: int
    unexplained: int
    dropped_differ: int
    weight_tokens: int
    weight_max: float | None
    weight_rms: float | None
    weight_nonfinite: int
    margin: str
    weight_worst: WeightDifference | None = None
    examples: tuple[RoutingDifference, ...] = ()

    @property
    def agreement(self) -> float:
        """Part of tokens with equal expert sets; 1 when there is no token."""
        return self.same_sets / self.tokens if self.tokens else 1.0


def summarize(
    routing: TokenRouting,
    engine: LayerTrace,
    reference: LayerTrace,
    logits: NDArray[Any] | None,
    coordinates: list[tuple[int, int | None, int | None]],
) -> RoutingAgreement:
    """Counts and the first differences. ``coordinates`` [T]: each token's row, batch, position."""
    import numpy as np

    engine_ids, reference_ids = engine.expert_ids, reference.expert_ids
    judged = routing.weight_error[routing.weights_judged]
    finite = judged[np.isfinite(judged)]
    examples: list[RoutingDifference] = []
    for kind, mask in (
        ("unexplained", routing.unexplained),
        ("near tie", routing.near_tie),
        ("after a tie", routing.after_tie),
    ):
        for t in np.flatnonzero(mask)[: MAX_EXAMPLES - len(examples)]:
            token, batch, position = coordinates[t]
            gap = None if logits is None else _gap(logits[t], engine_ids[t], reference_ids[t])
            examples.append(
                RoutingDifference(
                    token=token,
                    batch=batch,
                    position=position,
                    kind=kind,
                    engine=tuple(int(i) for i in engine_ids[t]),
                    reference=tuple(int(i) for i in reference_ids[t]),
                    gap=gap,
                    bound=None if logits is None else float(routing.bound[t]),
                )
            )
    return RoutingAgreement(
        tokens=len(routing.same),
        same_sets=int(routing.same.sum()),
        same_order=int(routing.ordered.sum()),
        near_ties=int(routing.near_tie.sum()),
        after_ties=int(routing.after_tie.sum()),
        unexplained=int(routing.unexplained.sum()),
        dropped_differ=int((routing.dropped & ~routing.same).sum()),
        weight_tokens=len(judged),
        weight_max=float(finite.max()) if finite.size else None,
        weight_rms=float(np.sqrt(np.mean(finite**2))) if finite.size else None,
        weight_nonfinite=int(len(judged) - len(finite)),
        margin=routing.margin,
        weight_worst=_worst_weights(routing, coordinates),
        examples=tuple(examples),
    )


def _worst_weights(
    routing: TokenRouting, coordinates: list[tuple[int, int | None, int | None]]
) -> WeightDifference | None:
    import numpy as np

    judged = np.flatnonzero(routing.weights_judged)
    if not judged.size:
        return None
    t = int(judged[int(np.argmax(routing.weight_error[judged]))])
    token, batch, position = coordinates[t]
    ids, engine, reference = (part[t] for part in routing.weights)
    return WeightDifference(
        token, batch, position, tuple(int(i) for i in ids), _finite(engine), _finite(reference)
    )


def place(batch: int | None, position: int | None, token: int | None) -> str:
    """``batch 0, position 5``, or ``row 12`` where the layer's rows have no batch and position."""
    return f"row {token}" if batch is None or position is None else f"batch {batch}, position {position}"


def _finite(values: NDArray[np.float64]) -> tuple[float | None, ...]:
    import math

    return tuple(float(v) if math.isfinite(v) else None for v in values)


def _numbers(values: tuple[float | None, ...]) -> str:
    return "[" + ", ".join("not finite" if v is None else f"{v:.6g}" for v in values) + "]"


def _gap(logits: NDArray[Any], engine: NDArray[np.int32], reference: NDArray[np.int32]) -> float | None:
    """Largest logit the engine gave up minus the smallest it took instead; None where that is not defined."""
    import numpy as np

    given_up = [i for i in reference if i >= 0 and i not in engine]
    taken = [i for i in engine if 0 <= i < len(logits) and i not in reference]
    if not given_up or not taken:
        return None
    gap = float(max(logits[i] for i in given_up)) - float(min(logits[i] for i in taken))
    return gap if np.isfinite(gap) else None
