"""Compares what two runs left behind per MoE layer: input, router logits, routing, output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .agreement import RoutingAgreement, summarize
from .compare import TensorError, compare_arrays, row_errors
from .routing import TokenRouting, compare_routing
from .ties import make_prover
from .tolerance import Tolerances

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..schema import MoELayer
    from ..trace import LayerTrace, TracedRun

Coordinate = tuple[int, int | None, int | None]
"""A layer's row, and the batch and position it stands for where known."""


@dataclass(frozen=True)
class RowError:
    """Errors of a [T, H] value, each token relative to its own size; ``nonfinite`` counts tokens."""

    max: float | None
    rms: float | None
    nonfinite: int
    token: int | None
    batch: int | None
    position: int | None


@dataclass(frozen=True)
class LayerResult:
    """One layer in one run. ``problem`` says why the layer could not be compared, else it is empty."""

    index: int
    name: str
    tokens: int
    hidden: RowError | None = None
    logits: RowError | None = None
    output: RowError | None = None
    output_error: TensorError | None = None
    routing: RoutingAgreement | None = None
    problem: str = ""


@dataclass(frozen=True)
class LayerComparison:
    """The arrays behind a :class:`LayerResult`, over the T compared tokens; errors are relative per token."""

    layer: MoELayer
    result: LayerResult
    coordinates: list[Coordinate]
    engine: LayerTrace
    reference: LayerTrace
    hidden: NDArray[np.float64]
    logits: NDArray[np.float64] | None
    output: NDArray[np.float64]
    routing: TokenRouting
    after_tie: NDArray[np.bool_]
    """Tokens whose input or routing a proven near tie changed by flipping, here or in an earlier layer."""
    undecided: NDArray[np.bool_]
    """Tokens whose choice hangs on rounding; empty where that is not known."""

    def light(self) -> LayerComparison:
        """The same without the [T, H] arrays."""
        return dataclasses.replace(self, engine=_light(self.engine), reference=_light(self.reference))


def compare_layers(
    engine: TracedRun,
    reference: TracedRun,
    layers: Sequence[MoELayer],
    masks: Sequence[NDArray[np.bool_]],
    tolerances: Tolerances,
    *,
    forced: bool,
) -> tuple[list[LayerComparison], list[LayerResult]]:
    """Compare every MoE layer of two runs, in order.

    ``masks`` are the token masks [batch, length] a layer may run over (an encoder's, a decoder's); a layer
    takes the first whose size is its number of tokens, and without one all its tokens count. ``forced``: the
    engine replayed the reference's routing, so its ids say nothing and no difference is excused by a tie.

    Returns the comparisons, and the results including layers that could not be compared (named in
    ``problem``).
    """
    comparisons: list[LayerComparison] = []
    results: list[LayerResult] = []
    tie_before = False
    for who, run in (("engine", engine), ("reference", reference)):
        if len(run.layers) != len(layers):
            problem = f"the manifest has {len(layers)} MoE layer(s), the {who}'s run has {len(run.layers)}"
            return [], [LayerResult(layer.index, layer.name, 0, problem=problem) for layer in layers]
    for layer, mine, theirs in zip(layers, engine.layers, reference.layers, strict=True):
        problem = _problem(mine, theirs)
        if problem:
            results.append(LayerResult(layer.index, layer.name, 0, problem=problem))
            continue
        rows, coordinates = _rows(len(theirs.expert_ids), masks)
        comparison = _compare(
            layer, _take(mine, rows), _take(theirs, rows), coordinates, tolerances, forced, tie_before
        )
        tie_before = tie_before or bool(comparison.routing.near_tie.any())
        comparisons.append(comparison)
        results.append(comparison.result)
    return comparisons, results


def _compare(
    layer: MoELayer,
    engine: LayerTrace,
    reference: LayerTrace,
    coordinates: list[Coordinate],
    tolerances: Tolerances,
    forced: bool,
    tie_before: bool,
) -> LayerComparison:
    import numpy as np

    hidden = row_errors(engine.hidden, reference.hidden)
    output = row_errors(engine.output, reference.output)
    logits = None
    if (
        engine.logits is not None
        and reference.logits is not None
        and engine.logits.shape == reference.logits.shape
    ):
        logits = row_errors(engine.logits, reference.logits)
    bound = tolerances["moe.near_tie"].value
    moved = hidden > bound
    # Router logits may be off by the dtype's error or, deep in a model, by what the layer's input is already
    # off.
    prover = make_prover(layer, engine, reference, bound)
    routing = compare_routing(
        engine,
        reference,
        prover,
        near_tie=np.maximum(bound, np.minimum(2 * hidden, tolerances["moe.output"].value)),
        weight_limit=tolerances["moe.weights"].value,
        moved=moved,
        tie_before=tie_before and not forced,
    )
    after_tie = routing.near_tie | routing.after_tie
    if tie_before and not forced:
        after_tie = after_tie | moved
    result = LayerResult(
        index=layer.index,
        name=layer.name,
        tokens=len(coordinates),
        hidden=row_error(hidden, coordinates),
        logits=None if logits is None else row_error(logits, coordinates),
        output=row_error(output, coordinates),
        output_error=compare_arrays(engine.output, reference.output),
        routing=summarize(routing, engine, reference, prover.logits, coordinates),
    )
    return LayerComparison(
        layer=layer,
        result=result,
        coordinates=coordinates,
        engine=engine,
        reference=reference,
        hidden=hidden,
        logits=logits,
        output=output,
        routing=routing,
        after_tie=np.asarray(after_tie),
        undecided=prover.undecided(bound),
    )


def _problem(engine: LayerTrace, reference: LayerTrace) -> str:
    for field in ("expert_ids", "weights", "hidden", "output"):
        mine, theirs = getattr(engine, field), getattr(reference, field)
        if mine.ndim != 2 or mine.shape != theirs.shape:
            return f"{field} has shape {list(mine.shape)} where the reference has {list(theirs.shape)}"
    return ""


def _rows(count: int, masks: Sequence[NDArray[np.bool_]]) -> tuple[NDArray[np.int64], list[Coordinate]]:
    import numpy as np

    for mask in masks:
        if mask.size == count:
            rows = np.flatnonzero(mask.reshape(-1))
            length = mask.shape[1]
            return rows, [(int(r), int(r) // length, int(r) % length) for r in rows]
    return np.arange(count), [(r, None, None) for r in range(count)]


def _take(trace: LayerTrace, rows: NDArray[np.int64]) -> LayerTrace:
    from ..trace import LayerTrace

    return LayerTrace(
        index=trace.index,
        name=trace.name,
        expert_ids=trace.expert_ids[rows],
        weights=trace.weights[rows],
        hidden=trace.hidden[rows],
        output=trace.output[rows],
        logits=None if trace.logits is None else trace.logits[rows],
    )


def _light(trace: LayerTrace) -> LayerTrace:
    import numpy as np

    nothing = np.zeros((0, trace.hidden.shape[1]), np.float32)
    return dataclasses.replace(trace, hidden=nothing, output=nothing, logits=None)


def row_error(errors: NDArray[np.float64], coordinates: list[Coordinate]) -> RowError:
    """Largest and root mean square of per-token ``errors`` [T], and where the largest is."""
    import numpy as np

    if not errors.size:
        return RowError(None, None, 0, None, None, None)
    finite = errors[np.isfinite(errors)]
    token: Coordinate = coordinates[int(np.argmax(errors))]
    return RowError(
        max=float(finite.max()) if finite.size else None,
        rms=float(np.sqrt(np.mean(finite**2))) if finite.size else None,
        nonfinite=int(errors.size - finite.size),
        token=token[0],
        batch=token[1],
        position=token[2],
    )


def first_rows(comparison: LayerComparison, mask: NDArray[Any]) -> Coordinate:
    """Coordinates of the first token under ``mask`` [T] (by position, then batch: the earliest in time)."""
    import numpy as np

    rows = [comparison.coordinates[int(t)] for t in np.flatnonzero(mask)]
    return min(rows, key=lambda c: (c[2] if c[2] is not None else c[0], c[1] or 0))
