"""A plan on its GPU for verification: outputs are its own, what happens inside is shown by its simulation.

A TensorRT plan shows its outputs only. The lowered graph that it was built from shows routing and MoE layers,
and takes routing from outside, on the CPU. So the plan is judged as the engine that users run, and the
simulation as the same engine with its routing shown: a plan that differs from a right simulation is reported
as ``optimised engine``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from ..runtime.session import Session
    from ..schema import Manifest, ModelIO
    from ..trace import LayerTrace, TracedRun
    from .simulate import SimulatedSession

    Array = NDArray[Any]

NOTE = "outputs are the plan's, on its GPU; MoE layers and routing are shown by the same graph on the CPU"


class PlanSession:
    """``plan`` runs, ``simulated`` shows. Both are of one bundle; they are closed together."""

    def __init__(self, plan: Session, simulated: SimulatedSession) -> None:
        self._plan, self._simulated = plan, simulated
        self.manifest: Manifest = simulated.manifest

    @property
    def io(self) -> ModelIO:
        """Inputs and outputs of the model."""
        return self.manifest.io

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer; None where it has none."""
        return self._plan.tokenizer

    def __enter__(self) -> PlanSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plan.close()
        self._simulated.__exit__(kind, error, trace)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The plan's outputs."""
        return self._plan.run(inputs)

    def run_traced(
        self, inputs: Mapping[str, Any], *, force_routing: Sequence[LayerTrace] | None = None
    ) -> TracedRun:
        """As :meth:`SimulatedSession.run_traced`."""
        return self._simulated.run_traced(inputs, force_routing=force_routing)

    def chunked_logits(self, input_ids: Any, attention_mask: Any, chunks: Sequence[int]) -> TracedRun:
        """As :meth:`SimulatedSession.chunked_logits`."""
        return self._simulated.chunked_logits(input_ids, attention_mask, chunks)

    def notes(self) -> list[str]:
        """What a report says of it."""
        use = self._plan.capacity_use
        return [NOTE] if use is None else [NOTE, f"buckets of the plan: {use.text()}"]
