"""A backend turns the portable model into what its target runs, and writes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..passes.base import PassContext
from ..passes.pipelines import run_pipeline
from ..schema import Decision, ModelIO, MoELayer

if TYPE_CHECKING:
    from ..importer.export import ExportedModel

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


@dataclass(frozen=True)
class Lowered:
    """What a backend wrote."""

    io: ModelIO
    moe_layers: tuple[MoELayer, ...]
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]
    cache: Literal["growing", "shared"]
    rows_apart: bool
    quantized_layers: tuple[int, ...] = ()
    """Indices of the MoE layers whose experts are quantised."""


class Backend(ABC):
    """One target. Subclasses name it and write :meth:`_write`."""

    name: str
    summary: str

    def build(self, exported: ExportedModel, folder: Path, options: Mapping[str, Any]) -> Lowered:
        """Lower ``exported`` with the target's pipeline and write ``model.onnx`` and its weights into
        ``folder``.

        Raises:
            ExportError: a pass broke the graph. OSError: the folder cannot be written.
        """
        context = PassContext(
            exported.model,
            exported.io,
            exported.moe_layers,
            exported.dtype,
            exported.opset,
            self._options(options),
            list(exported.decisions),
            list(exported.notes),
            float32_weights=exported.float32_weights,
        )
        run_pipeline(self.name, context)
        self._write(context, folder)
        return Lowered(
            context.io,
            context.layers,
            tuple(context.decisions),
            tuple(context.notes),
            context.cache,
            context.rows_apart,
            context.quantized,
        )

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the passes are given: ``options``, and what only this target's environment knows."""
        return dict(options)

    @abstractmethod
    def _write(self, context: PassContext, folder: Path) -> None:
        """Write the lowered model."""


def write_onnx(context: PassContext, folder: Path) -> None:
    """Write ``model.onnx`` with its weights in ``model.onnx.data``."""
    import onnx_ir as ir

    model = context.model
    model.graph.sort()
    # Traces of the passes' own work, most of a small file.
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    model.ir_version = 10
    ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE)
