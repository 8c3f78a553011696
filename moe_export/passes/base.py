"""A pass: one transformation of a graph. This base checks that what others rely on still holds after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ExportError
from ..graph.names import duplicate_names, named_values
from ..ops import DOMAIN, OPS
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
    fused: tuple[int, ...] = ()
    """Indices of the MoE layers whose experts are one ExpertMLP node."""
    quantized: tuple[int, ...] = ()
    """Indices of the MoE layers whose experts are quantised; none of the plain expert nodes are left."""
    float32_weights: frozenset[str] = frozenset()
    """Initializers that stay float32 where the others are stored in bfloat16."""


class Pass(ABC):
    """One transformation. Subclasses write :meth:`_run`; callers use :meth:`apply`."""

    name: str
    """Shown in reports."""

    def apply(self, context: PassContext) -> None:
        """Run the pass and check that inputs, outputs, MoE values and function bodies are still there.

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
        if doubled := duplicate_names(context.model):
            raise ExportError(f"pass {self.name!r} gave the name {doubled[0]!r} to two values")
        self._check_layers(context)
        self._check_functions(context)

    def _check_layers(self, context: PassContext) -> None:
        """Every value of every MoE layer is there, in the dtype verification reads."""
        values = dict(named_values(context.model))
        for layer in context.layers:
            for name in (layer.hidden, layer.expert_ids, layer.weights, layer.output, layer.logits):
                if name is not None and name not in values:
                    raise ExportError(
                        f"pass {self.name!r} lost the value {name!r} of MoE layer {layer.name!r}"
                    )
            dtype = values[layer.expert_ids].dtype
            if dtype is not None and dtype.name not in ("INT32", "INT64"):
                raise ExportError(f"pass {self.name!r} made {layer.expert_ids!r} {dtype.name}, no integers")

    def _check_functions(self, context: PassContext) -> None:
        """Every op of ours that has a body has it in the model, so that any runtime executes it."""
        held = {(key[0], key[1]) for key in context.model.functions}
        for node in context.model.graph.all_nodes():
            if node.domain != DOMAIN or (node.op_type in OPS and OPS[node.op_type].body is None):
                continue
            if (node.domain, node.op_type) not in held:
                raise ExportError(f"pass {self.name!r} left a {node.op_type} node without its function body")

    @abstractmethod
    def _run(self, context: PassContext) -> None:
        """Transform ``context.model`` in place; record decisions and notes."""
