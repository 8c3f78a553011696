"""Source model → portable model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..progress import NullProgress, Progress
from ..schema import Decision, ModelIO, MoELayer
from .sources import LoadedSource, load_source

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn


@dataclass(frozen=True)
class ExportedModel:
    """The portable model and what is known about it."""

    model: ir.Model
    io: ModelIO
    moe_layers: tuple[MoELayer, ...]
    source: LoadedSource
    dtype: str
    opset: int
    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()


@contextmanager
def hooked(model: nn.Module, family: str | None) -> Iterator[None]:
    """Inside, every MoE layer of ``model`` runs as our ops, and the family's own patches are active."""
    from ..models.adapters import adapted
    from ..models.experts import LAYER_ATTRIBUTE, is_experts_module, register_hook
    from ..models.patches import family_patches

    with ExitStack() as stack:
        stack.enter_context(family_patches(family, model))
        stack.enter_context(adapted(model))
        experts = [(name, m) for name, m in model.named_modules() if is_experts_module(m)]
        for name, module in experts:
            setattr(module, LAYER_ATTRIBUTE, name)
        if experts:
            before = model.get_experts_implementation()  # type: ignore[operator]
            model.set_experts_implementation(register_hook())  # type: ignore[operator]
            stack.callback(model.set_experts_implementation, before)  # type: ignore[operator,arg-type]
        yield


def export_model(
    source: Any,
    *,
    task: str | None = None,
    dtype: str = "float32",
    opset: int = 20,
    inputs: dict[str, Any] | None = None,
    dynamic: dict[str, dict[int, str]] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportedModel:
    """Export ``source`` (see :func:`moe_export.importer.sources.load_source`, or a LoadedSource) to the
    portable model.

    ``dtype`` float16 traces the model in float16; bfloat16 stores the weights in bfloat16 and computes in
    float32.

    Raises:
        SourceError, UnsupportedModelError: the source cannot be read or is refused.
        ExportError: it cannot be traced without freezing what must stay dynamic.
    """
    from ..graph.moe_values import name_moe_values
    from ..models.adapters import require_adapters
    from . import graphs
    from .trace import trace

    progress = progress or NullProgress()
    loaded = (
        source
        if isinstance(source, LoadedSource)
        else load_source(
            source,
            task=task,
            inputs=inputs,
            dynamic=dynamic,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    )
    model = loaded.module
    require_adapters(model)
    if dtype == "float16":
        model = copy.deepcopy(model).half()
    family = loaded.info.model_type if loaded.kind == "huggingface" else None
    with progress.stage("trace"), hooked(model, family):
        if loaded.kind == "module":
            sample = {
                n: t.half() if dtype == "float16" and t.is_floating_point() else t
                for n, t in loaded.inputs.items()
            }
            plan = graphs.module_graph(model, sample, loaded.dynamic)
        elif loaded.task == "feature-extraction":
            plan = graphs.plain_graph(model, "last_hidden_state")  # type: ignore[arg-type]
        elif loaded.encoder_decoder:
            plan = graphs.plain_graph(model, "logits", encoder_decoder=True)  # type: ignore[arg-type]
        else:
            plan = graphs.decoder_graph(model)  # type: ignore[arg-type]
        graph, io = trace(plan, opset)
    _check_experts_traced(model, graph)
    layers = name_moe_values(graph)
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in graph.graph.initializers.values():
        value.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.metadata_props.clear()
    graph.producer_name = "moe-export"
    return ExportedModel(graph, io, layers, loaded, dtype, opset)


def _check_experts_traced(model: nn.Module, graph: ir.Model) -> None:
    """As many MoE layers in the graph as the model ran: none was traced past the hook."""
    from ..models.adapters import spec_of
    from ..models.experts import is_experts_module
    from ..models.library_blocks import library_blocks
    from ..ops import DOMAIN

    expected = sum(1 for m in model.modules() if is_experts_module(m) or spec_of(m) is not None)
    expected += len(library_blocks(model))
    found = sum(1 for n in graph.graph if n.domain == DOMAIN and n.op_type == "Dispatch")
    if found < expected:
        raise ExportError(
            f"the model has {expected} MoE layers and the traced graph {found}: some were not reached by "
            "the sample inputs or were traced around the hook"
        )
