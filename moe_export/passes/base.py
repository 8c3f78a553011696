"""A pass: one transformation of a graph. This base checks that what others rely on still holds after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ExportError
from ..graph.moe_values import find_value
from ..schema import Decision, ModelIO, MoELayer

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass
class PassContext:
    """What passes work on and write into."""

    model: ir.Model
    io: ModelIO
    layers: tuple[MoELayer, ...]
    dtype: str
    opset: int
    options: Mapping[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cache: Literal["growing", "shared"] = "growing"
    rows_apart: bool = False


class Pass(ABC):
    """One transformation. Subclasses write :meth:`_run`; callers use :meth:`apply`."""

    name: str
    """Shown in reports."""

    def apply(self, context: PassContext) -> None:
        """Run the pass and check that inputs, outputs and MoE value names are still there.

        Raises:
            ExportError: the pass broke an invariant (a defect of moe-export); names which.
        """
        self._run(context)
        graph = context.model.graph
        for kind, specs, values in (
            ("input", context.io.inputs, graph.inputs),
            ("output", context.io.outputs, graph.outputs),
        ):
            if [s.name for s in specs] != [v.name for v in values]:
                raise ExportError(f"pass {self.name!r} changed the model's {kind}s")
        for layer in context.layers:
            for value in (layer.hidden, layer.expert_ids, layer.weights, layer.output):
                if find_value(context.model, value) is None:
                    raise ExportError(
                        f"pass {self.name!r} lost the value {value!r} of MoE layer {layer.name!r}"
                    )

    @abstractmethod
    def _run(self, context: PassContext) -> None:
        """Transform ``context.model`` in place; record decisions and notes."""
