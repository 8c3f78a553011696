"""Tracing a hollow model: from shapes alone, and each kind of layer only as often as it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..schema import ModelIO
    from .graphs import TracedGraph
    from .layer_kinds import LayerKinds
    from .weight_sources import StoredWeights

GRAPH_PREFIX = "model."
"""What stands before the model's own names in a traced graph."""


def trace_from_shapes(
    model: Any, plan: Callable[[], TracedGraph], opset: int, stored: StoredWeights
) -> tuple[ir.Model, ModelIO, tuple[str, ...]]:
    """Trace ``plan()`` of a hollow ``model``; layers that do the same are traced a few times and then copied.

    Returns the graph, its inputs and outputs, and notes for the report.

    Raises:
        ExportError: the model looks at values before it knows what to compute, or cannot be traced.
    """
    from .layer_copies import CannotCopy, copy_layers
    from .layer_kinds import LayerKinds, decoder_layers, only_first_layers, shortest_prefix
    from .trace import trace

    found = decoder_layers(model)
    if found is None:
        return *trace(_planned(plan), opset, stored), ()
    path, layers = found
    kinds, whole = _kinds_and_plan(model, path, plan)
    prefix = shortest_prefix(kinds.layers)
    if prefix is None or prefix >= len(layers):
        return *trace(whole, opset, stored), ()
    buffers = {GRAPH_PREFIX + name: tensor for name, tensor in model.named_buffers()}

    def complete(graph: ir.Model, io: ModelIO) -> ModelIO:
        return copy_layers(graph, io, GRAPH_PREFIX + path, kinds.layers, prefix, buffers)

    try:
        with only_first_layers(model, path, prefix):
            short, first = _kinds_and_plan(model, path, plan)
            if short != LayerKinds(kinds.layers[:prefix], kinds.around):
                raise CannotCopy("with fewer layers the model computes something else")
            graph, io = trace(first, opset, stored, complete)
        if [s.name for s in io.inputs] != [s.name for s in whole.io.inputs]:
            raise CannotCopy("the whole model has other inputs")
    except CannotCopy as error:
        return *trace(whole, opset, stored), (f"every layer was traced by itself: {error}",)
    text = f"{prefix} of {len(layers)} layers were traced, the others copied from those of their kind"
    return graph, io, (text,)


def _kinds_and_plan(model: Any, path: str, plan: Callable[[], TracedGraph]) -> tuple[LayerKinds, TracedGraph]:
    """Both from one run of ``plan``."""
    from .layer_kinds import layer_kinds

    runs: list[TracedGraph] = []
    with _no_values():
        kinds = layer_kinds(model, model.get_submodule(path), lambda: runs.append(plan()))
    return kinds, _with_values(runs[0])


def _planned(plan: Callable[[], TracedGraph]) -> TracedGraph:
    with _no_values():
        made = plan()
    return _with_values(made)


def _with_values(plan: TracedGraph) -> TracedGraph:
    """Any values do: only shapes and dtypes of the sample reach the trace."""
    import torch

    sample = tuple(torch.ones(tuple(t.shape), dtype=t.dtype) for t in plan.sample)
    return dataclasses.replace(plan, sample=sample)


@contextmanager
def _no_values() -> Iterator[None]:
    """Inside, tensors have shapes and dtypes only.

    Raises:
        ExportError: something asks for a value.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    except DataDependentOutputException as error:
        raise ExportError(
            f"the model decides by values what it computes ({error}), so it cannot be traced from shapes "
            "alone; export with --weights load"
        ) from error
