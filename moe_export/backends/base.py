"""A backend turns the portable model into what its target runs, and writes it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..passes.base import PassContext
from ..passes.pipelines import run_pipeline
from ..schema import Decision, EngineFile, ExpertParallel, ModelIO, MoELayer
from .data_file import forget_journals
from .weight_files import place_weights

if TYPE_CHECKING:
    from ..importer.export import ExportedModel

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


class LayerSize(Protocol):
    """What is known of an MoE layer before it is exported; None: nothing tells."""

    @property
    def name(self) -> str: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def top_k(self) -> int | None: ...

    @property
    def hidden_size(self) -> int | None: ...

    @property
    def intermediate_size(self) -> int | None: ...


@dataclass(frozen=True)
class Plans:
    """What a target that compiles beyond ONNX wrote; see the fields of the same names of
    :class:`Manifest`."""

    sm: tuple[int, ...] = ()
    engines: tuple[EngineFile, ...] = ()
    state: Literal["ready", "needs-gpu-build"] = "ready"


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
    plans: Plans = Plans()


class Backend(ABC):
    """One target. Subclasses name it and write :meth:`_write`."""

    name: str
    summary: str

    def build(self, exported: ExportedModel, folder: Path, options: Mapping[str, Any]) -> Lowered:
        """Lower ``exported`` with the target's pipeline and write ``model.onnx`` and its weights into
        ``folder``; of an expert-parallel model (``options["expert_parallel"]``), those of each rank into a
        folder of its own, one after the other.

        Raises:
            ExportError: a pass broke the graph. OSError: the folder cannot be written.
        """
        context = PassContext(
            exported.model,
            exported.io,
            exported.moe_layers,
            exported.dtype,
            exported.opset,
            {**self._options(options), "target": self.name},
            list(exported.decisions),
            list(exported.notes),
            float32_weights=exported.float32_weights,
        )
        plan: ExpertParallel | None = options.get("expert_parallel")
        if plan is None:
            run_pipeline(self.name, context)
            lowered = self._lowered(context, folder)
            forget_journals(folder)
            return lowered
        run_pipeline(self.name, context, "shared")
        ranks = []
        for rank in range(plan.ranks):
            (folder / plan.folder(rank)).mkdir(exist_ok=True)  # of an interrupted build that goes on
            own = dataclasses.replace(
                context,
                model=context.model.clone(),  # its weights are the original's, until they are sliced
                options={**context.options, "rank": rank},
                decisions=list(context.decisions),
                notes=list(context.notes),
            )
            run_pipeline(self.name, own, "rank")
            ranks.append(self._lowered(own, folder / plan.folder(rank)))
        forget_journals(folder)
        return _all_ranks(plan, ranks)

    def _lowered(self, context: PassContext, folder: Path) -> Lowered:
        """Write what the passes have made."""
        plans = self._write(context, folder) or Plans()
        return Lowered(
            context.io,
            context.layers,
            tuple(context.decisions),
            tuple(context.notes),
            context.cache,
            context.rows_apart,
            context.quantized,
            plans,
        )

    def environment(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What of this machine decides what a bundle holds, as JSON values; part of the cache key.

        ``options``: fields of :class:`BuildConfig`. Called before any long work, so that what cannot be
        done is
        refused early.

        Raises:
            UsageError, EnvironmentLacksError: this target cannot be built so, or not here.
        """
        return {}

    def check_layers(self, layers: Iterable[LayerSize], options: Mapping[str, Any]) -> None:
        """Refuse MoE layers that this target cannot hold, before the model is exported.

        Raises:
            UsageError: names the layer, the limit and what to do instead.
        """
        return None

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the passes are given: ``options``, and what only this target's environment knows."""
        return dict(options)

    @abstractmethod
    def _write(self, context: PassContext, folder: Path) -> Plans | None:
        """Write the lowered model; returns what was compiled from it, if anything."""


def _all_ranks(plan: ExpertParallel, ranks: Sequence[Lowered]) -> Lowered:
    """What the ranks' graphs are together. They differ in the experts that they hold, so decisions and notes
    are those of rank 0."""
    engines = tuple(
        dataclasses.replace(engine, file=f"{plan.folder(rank)}/{engine.file}", rank=rank)
        for rank, lowered in enumerate(ranks)
        for engine in lowered.plans.engines
    )
    first = ranks[0]
    ready = all(lowered.plans.state == "ready" for lowered in ranks)
    plans = dataclasses.replace(
        first.plans, engines=engines, state="ready" if ready else "needs-gpu-build"
    )
    notes = (*first.notes, "decisions are those of rank 0; the other ranks differ in the experts they hold")
    return dataclasses.replace(first, plans=plans, notes=notes)


def write_onnx(context: PassContext, folder: Path) -> None:
    """Write ``model.onnx`` with its weights in ``model.onnx.data``, or where the checkpoint has them."""
    import onnx_ir as ir

    model = context.model
    model.graph.sort()
    # Traces of the passes' own work, most of a small file.
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    model.ir_version = 10
    files = place_weights(model, folder, DATA_FILE)
    if files.referenced:
        context.notes.append(f"weights: {files.text()}")
    ir.save(model, folder / MODEL_FILE)
