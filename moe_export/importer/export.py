"""Source model → portable model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, UsageError, choices_text
from ..progress import NullProgress, Progress
from ..schema import DTYPES, Decision, ModelIO, MoELayer
from .from_shapes import trace_from_shapes
from .kept import quantized_decision
from .sources import LoadedSource, load_source

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from .graphs import TracedGraph


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
    float32_weights: frozenset[str] = frozenset()
    """Initializers that stay float32 where the others are stored in bfloat16."""


@contextmanager
def hooked(model: nn.Module, family: str | None) -> Iterator[None]:
    """Inside, every MoE layer of ``model`` runs as our ops, and the family's own patches are active."""
    from ..models.adapted import adapted
    from ..models.experts import experts_as_ops
    from ..models.patches import family_patches

    with family_patches(family, model), adapted(model), experts_as_ops(model):
        yield


def moe_layer_names(model: nn.Module) -> set[str]:
    """Names of the MoE layers of ``model`` that text reaches and that run as our ops inside
    :func:`hooked`."""
    from ..models.adapted import adapted_blocks
    from ..models.experts import is_experts_module
    from ..models.library_blocks import library_blocks
    from ..models.patches import idle_parts

    blocks = adapted_blocks(model)
    within = {id(m) for block, _ in blocks.values() for m in block.modules()}
    experts = {
        name or type(m).__name__: m
        for name, m in model.named_modules()
        if is_experts_module(m) and id(m) not in within
    }
    every = {*blocks, *experts, *library_blocks(model)}
    return {name for name in every if not set(name.split(".")) & idle_parts(model)}


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
        UsageError: wrong arguments, or an adapter that does not describe its block.
        ExportError: it cannot be traced without freezing what must stay dynamic.
    """
    from ..graph.moe_values import name_moe_values
    from ..models.moe_patterns import require_adapters
    from .trace import check_opset

    progress = progress or NullProgress()
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; {choices_text(dtype, DTYPES)}")
    check_opset(opset)
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
    require_adapters(loaded.module)
    with progress.stage("trace"):
        graph, io, notes = _trace(loaded, dtype, opset)
    layers = name_moe_values(graph)
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in graph.graph.initializers.values():
        value.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.metadata_props.clear()
    graph.producer_name = "moe-export"
    return ExportedModel(
        graph,
        io,
        layers,
        loaded,
        dtype,
        opset,
        _of_quantized(loaded, dtype, opset),
        notes=notes,
        float32_weights=_float32_weights(loaded.module),
    )


def _of_quantized(loaded: LoadedSource, dtype: str, opset: int) -> tuple[Decision, ...]:
    if loaded.quantized is None:
        return ()
    return (quantized_decision(loaded.quantized, loaded.stored, dtype, opset),)


def _float32_weights(model: nn.Module) -> frozenset[str]:
    """Names in the graph of what the family keeps in float32, and of buffers that no checkpoint holds (tables
    of rotary frequencies and the like)."""
    from ..models.precision import float32_names

    computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    return frozenset(f"model.{name}" for name in computed | float32_names(model, "bfloat16"))


def _trace(loaded: LoadedSource, dtype: str, opset: int) -> tuple[ir.Model, ModelIO, tuple[str, ...]]:
    from ..models.adapted import check_adapters
    from ..models.precision import as_float16
    from . import graphs
    from .trace import trace

    model: Any = as_float16(loaded.module) if dtype == "float16" else loaded.module
    family = loaded.info.model_type if loaded.kind == "huggingface" else None
    sample = {
        name: t.half() if dtype == "float16" and t.is_floating_point() else t
        for name, t in loaded.inputs.items()
    }
    notes: tuple[str, ...] = ()
    if loaded.kind == "module":
        check_adapters(model, lambda: graphs.run_module(model, sample))
    with hooked(model, family):
        if loaded.kind == "module":
            graph, io = trace(graphs.module_graph(model, sample, loaded.dynamic), opset)
        elif loaded.stored is not None:
            graph, io, notes = trace_from_shapes(
                model, lambda: _library_graph(model, loaded), opset, loaded.stored
            )
        else:
            graph, io = trace(_library_graph(model, loaded), opset)
        _check_experts_traced(moe_layer_names(model), graph)
    return graph, io, notes


def _library_graph(model: Any, loaded: LoadedSource) -> TracedGraph:
    from . import graphs

    if loaded.task == "feature-extraction":
        return graphs.plain_graph(model, "last_hidden_state")
    if loaded.encoder_decoder:
        return graphs.plain_graph(model, "logits", encoder_decoder=True)
    return graphs.decoder_graph(model)


def _check_experts_traced(expected: set[str], graph: ir.Model) -> None:
    """Each MoE layer of the model is in the graph: none was traced past the hook.

    Raises:
        ExportError: names those that are not.
    """
    from ..ops import DOMAIN

    found = {
        n.attributes["layer"].as_string()
        for n in graph.graph
        if n.domain == DOMAIN and n.op_type == "Dispatch"
    }
    if missing := sorted(expected - found):
        raise ExportError(
            f"{len(missing)} of the {len(expected)} MoE layers are not in the traced graph: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; the sample inputs do not reach "
            "them, or the model computes their experts around the block's forward, and the engine would not "
            "hold what the model chooses"
        )
