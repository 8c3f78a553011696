"""Runs one case on an engine: as users run it, with its routing shown, and with the reference's routing
replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .inputs import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runtime.session import Session
    from ..trace import LayerTrace, TracedRun
    from .plan_session import PlanSession
    from .simulate import SimulatedSession

    Array = NDArray[Any]


class EngineRuns:
    """The ways to run a case on a loaded bundle."""

    def __init__(self, session: Session | SimulatedSession | PlanSession) -> None:
        self._session = session
        io = session.io
        self._inputs = {t.name for t in io.inputs}
        self._outputs = [t.name for t in io.outputs if t.role != "cache"]
        self._pairs = {t.name: str(t.pair) for t in io.cache_inputs}

    def plain(self, case: Case) -> dict[str, Array]:
        """Outputs (without caches) of the engine as users run it; in chunks through caches handed back and
        forth."""
        if not case.chunks:
            outputs = self._session.run(self._known(case.inputs))
            return {name: outputs[name] for name in self._outputs}
        pieces = [outputs for outputs, _layers in self._steps(case, None, traced=False)]
        return self._join(pieces)

    def traced(self, case: Case) -> TracedRun:
        """The engine's own routing, with every MoE layer's values."""
        from ..trace import TracedRun

        if case.chunks:
            return self._session.chunked_logits(
                case.inputs["input_ids"], case.inputs["attention_mask"], case.chunks
            )
        run = self._session.run_traced(self._known(case.inputs))
        return TracedRun({name: run.outputs[name] for name in self._outputs}, run.layers)

    def forced(self, case: Case, routing: Sequence[LayerTrace]) -> TracedRun:
        """The engine with the reference's experts and weights in place of its own."""
        from ..trace import TracedRun

        if case.chunks:
            steps = list(self._steps(case, routing, traced=True))
            layers = [
                join_layers(parts, len(case.inputs["input_ids"]))
                for parts in zip(*(s[1] for s in steps), strict=True)
            ]
            return TracedRun(self._join([s[0] for s in steps]), tuple(layers))
        run = self._session.run_traced(self._known(case.inputs), force_routing=routing)
        return TracedRun({name: run.outputs[name] for name in self._outputs}, run.layers)

    def _known(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Without what only the reference takes (a mask, where the engine has none)."""
        return {name: value for name, value in inputs.items() if name in self._inputs}

    def _steps(
        self, case: Case, routing: Sequence[LayerTrace] | None, *, traced: bool
    ) -> list[tuple[dict[str, Array], tuple[LayerTrace, ...]]]:
        """Outputs and layers of each chunk. ``routing``: of the whole sequence, [batch x sequence] rows."""
        ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
        caches: dict[str, Array] = {}
        steps = []
        begin = 0
        for size in case.chunks:
            end = begin + size
            new = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
            inputs = {**self._known(new), **caches}
            layers: tuple[LayerTrace, ...] = ()
            if traced:
                part = None if routing is None else [_rows_of(t, ids.shape, begin, end) for t in routing]
                run = self._session.run_traced(inputs, force_routing=part)
                outputs, layers = run.outputs, run.layers
            else:
                outputs = self._session.run(inputs)
            caches = {name: outputs[pair] for name, pair in self._pairs.items()}
            steps.append(({name: outputs[name] for name in self._outputs}, layers))
            begin = end
        return steps

    def _join(self, pieces: Sequence[dict[str, Array]]) -> dict[str, Array]:
        import numpy as np

        return {name: np.concatenate([p[name] for p in pieces], axis=1) for name in self._outputs}


def _rows_of(trace: LayerTrace, shape: tuple[int, ...], begin: int, end: int) -> LayerTrace:
    """The tokens ``begin`` to ``end`` of each sequence of a trace over [batch, sequence] ``shape``."""

    def part(values: Array) -> Array:
        whole = values.reshape(*shape, *values.shape[1:])
        return whole[:, begin:end].reshape(-1, *values.shape[1:])

    return _map_trace(trace, part)


def join_layers(parts: Sequence[LayerTrace], batch: int) -> LayerTrace:
    """One trace over [batch, sequence] from the traces of its chunks."""
    import numpy as np

    def join(name: str) -> Any:
        arrays = [getattr(p, name) for p in parts]
        if arrays[0] is None:
            return None
        whole = np.concatenate([a.reshape(batch, -1, *a.shape[1:]) for a in arrays], axis=1)
        return whole.reshape(-1, *arrays[0].shape[1:])

    first = parts[0]
    fields = {name: join(name) for name in ("expert_ids", "weights", "hidden", "output", "logits")}
    return type(first)(index=first.index, name=first.name, **fields)


def _map_trace(trace: LayerTrace, part: Any) -> LayerTrace:
    return type(trace)(
        index=trace.index,
        name=trace.name,
        expert_ids=part(trace.expert_ids),
        weights=part(trace.weights),
        hidden=part(trace.hidden),
        output=part(trace.output),
        logits=None if trace.logits is None else part(trace.logits),
    )
