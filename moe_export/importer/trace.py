"""From a traced graph plan to an onnx_ir model: torch.export, proof that nothing was frozen, ONNX."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._sympy.numbers import int_oo

from ..errors import ExportError
from ..graph.functions import attach_functions
from ..graph.names import move_aside
from ..graph.onnxscript_rewrites import exact_rewrites, pairs_by_kind, weights_where_they_lie
from ..models.patches import step_differs
from ..ops.torch_ops import translation_table
from ..schema import ModelIO
from .graphs import TracedGraph
from .referenced import refer_to_weights
from .self_check import check_program
from .streamed import stream_weights
from .trace_errors import FIX, dimension_name, first_line, frozen, refused

if TYPE_CHECKING:
    import onnx_ir as ir

    from .weight_sources import StoredWeights

OPSETS = (20, 21, 22, 24)
"""ONNX opsets that ONNX Runtime runs correctly. 23 is refused: its RotaryEmbedding breaks there."""


@contextmanager
def _quiet() -> Iterator[None]:
    import torch.export._trace as exporting

    names = ("torch.onnx", "torch.export", "onnxscript", "transformers", "torch.fx", "torch._dynamo")
    before = [(logging.getLogger(n), logging.getLogger(n).level) for n in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger, _ in before:
            logger.setLevel(logging.CRITICAL)
        # torch.export prints the graph of a failed trace to stderr; shadow the print of that module.
        vars(exporting)["print"] = lambda *_args, **_kwargs: None
        try:
            yield
        finally:
            del vars(exporting)["print"]
            for logger, level in before:
                logger.setLevel(level)


@contextmanager
def library_patches() -> Iterator[None]:
    """transformers' own reversible patches that make its models traceable (masks, RoPE, caches)."""
    try:
        from transformers.exporters.utils import apply_patches
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("transformers"):
            raise
        yield
        return
    import transformers.exporters.exporter_onnx  # noqa: F401  (registers the patches)

    with ExitStack() as stack:
        stack.enter_context(apply_patches("dynamo"))
        stack.enter_context(apply_patches("onnx"))
        yield


def _library_table() -> dict[Any, Any]:
    try:
        from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("transformers"):
            raise
        return {}
    return dict(_ONNX_TRANSLATION_TABLE)


def _check_dynamic(program: torch.export.ExportedProgram, plan: TracedGraph) -> dict[str, str]:
    """Every symbolic dimension of the plan must still be symbolic and take any size; equal names are equal,
    others different.

    Returns traced symbol → name.
    """
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    user = [placeholders[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    limits = {str(symbol): limit.upper for symbol, limit in program.range_constraints.items()}
    seen: dict[str, tuple[str, str]] = {}
    for spec, node in zip(plan.io.inputs, user, strict=True):
        for axis, wanted in enumerate(spec.shape):
            actual = node.meta["val"].shape[axis]
            where = f"{spec.name}, axis {axis} ({wanted!r})"
            if isinstance(wanted, int):
                continue
            if not (isinstance(actual, torch.SymInt) and actual.node.expr.free_symbols):
                raise ExportError(frozen(where, str(actual)))
            name = str(actual)
            upper = limits.get(name)
            if upper is not None and upper != int_oo:
                raise ExportError(
                    f"{where} cannot be more than {upper} in the traced graph: the model's code branches on "
                    f"it. {FIX}"
                )
            if wanted in seen and seen[wanted][0] != name and wanted != "total":
                raise ExportError(f"{where}: expected the same size as {seen[wanted][1]}, traced as {name}")
            for other, (other_name, other_where) in seen.items():
                if other != wanted and other_name == name:
                    raise ExportError(
                        f"{where} was tied to {other_where} while tracing; the model needs them equal: give "
                        "both the "
                        "same dimension name"
                    )
            seen.setdefault(wanted, (name, where))
    return {name: wanted for wanted, (name, _) in seen.items()}


def check_opset(opset: int) -> None:
    """Refuse an opset that ONNX Runtime does not run correctly.

    Raises:
        ExportError: lists the choices.
    """
    if opset not in OPSETS:
        reason = " (its RotaryEmbedding gives wrong results in ONNX Runtime)" if opset == 23 else ""
        raise ExportError(
            f"opset {opset} is not supported{reason}; choose one of {', '.join(map(str, OPSETS))}"
        )


def trace(
    plan: TracedGraph,
    opset: int,
    stored: StoredWeights | None = None,
    complete: Callable[[ir.Model, ModelIO], ModelIO] | None = None,
) -> tuple[ir.Model, ModelIO]:
    """Trace, check, and translate to ONNX with our ops as nodes and their bodies as functions.

    ``stored``: the model is hollow, and this says where its weights lie; the graph then refers to them there
    or reads them when they are written, and the traced program is not run beside the model, which would need
    the weights.
    ``complete``: adds to the graph and its inputs and outputs what was not traced.

    Returns the model and its inputs and outputs with every dimension named.

    Raises:
        ExportError: the model cannot be traced, or a dynamic dimension was frozen.
    """
    check_opset(opset)
    from transformers.exporters.utils import apply_fx_node_fixes

    shapes = _dynamic_shapes(plan.io)
    names = [spec.name for spec in plan.io.inputs]
    with _quiet(), torch.no_grad(), library_patches(), exact_rewrites(), pairs_by_kind():
        dynamic = (*shapes[:2], tuple(shapes[2:])) if _has_rest(plan) else (tuple(shapes),)
        try:
            program = torch.export.export(plan.module, plan.sample, dynamic_shapes=dynamic, strict=False)
        except Exception as error:  # torch.export lets through whatever the model's own code raises.
            raise refused(error, plan.io, plan.subject) from error
        symbols = _check_dynamic(program, plan)
        if stored is None:
            check_program(
                program, plan, single_tokens=not step_differs(getattr(plan.module, "model", plan.module))
            )
        apply_fx_node_fixes("onnx", program.graph_module)
        try:
            exported = torch.onnx.export(
                program,
                args=(),
                input_names=names,
                output_names=[spec.name for spec in plan.io.outputs],
                custom_translation_table={**_library_table(), **translation_table()},
                opset_version=opset,
                optimize=stored is None,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"the traced model has no ONNX form: {first_line(error)}") from error
        assert exported is not None
        io = plan.io if complete is None else complete(exported.model, plan.io)
        if stored is not None:
            (stream_weights if stored.streamed else refer_to_weights)(exported.model, stored)
            with weights_where_they_lie():
                exported.optimize()
        from transformers.exporters.exporter_onnx import apply_onnx_ir_fixes

        apply_onnx_ir_fixes(exported)
    model = exported.model
    io = _resolve_outputs(model, io, symbols)
    _name_io(model, io)
    attach_functions(model, opset)
    return model, io


def _resolve_outputs(model: ir.Model, io: ModelIO, symbols: dict[str, str]) -> ModelIO:
    """Give each unnamed output dimension (``?``) its size, its input dimension's name, or its expression."""
    outputs = []
    for spec, value in zip(io.outputs, model.graph.outputs, strict=True):
        shape: list[int | str] = []
        for axis, wanted in enumerate(spec.shape):
            if wanted != "?":
                shape.append(wanted)
                continue
            actual = value.shape[axis] if value.shape is not None else None
            text = str(getattr(actual, "value", actual))
            shape.append(actual if isinstance(actual, int) else symbols.get(text, f"{spec.name}.{axis}"))
        outputs.append(dataclasses.replace(spec, shape=tuple(shape)))
    return ModelIO(io.inputs, tuple(outputs))


def _dynamic_shapes(io: ModelIO) -> tuple[dict[int, Any] | None, ...]:
    dims: dict[str, Any] = {"total": torch.export.Dim.AUTO}  # past + sequence: no Dim expresses a sum of two
    for spec in io.inputs:
        for d in spec.shape:
            if isinstance(d, str) and d not in dims:
                dims[d] = torch.export.Dim(dimension_name(d))
    return tuple(
        {a: dims[d] for a, d in enumerate(spec.shape) if isinstance(d, str)} or None for spec in io.inputs
    )


def _has_rest(plan: TracedGraph) -> bool:
    import inspect

    return len(inspect.signature(plan.module.forward).parameters) == 3


def _name_io(model: ir.Model, io: ModelIO) -> None:
    import onnx_ir as ir

    for value, spec in zip(model.graph.inputs, io.inputs, strict=True):
        _claim(model, value, spec.name)
        value.shape = ir.Shape(spec.shape)
    for index, (value, spec) in enumerate(zip(list(model.graph.outputs), io.outputs, strict=True)):
        if value.is_graph_input() or value.is_initializer() or value in list(model.graph.outputs)[:index]:
            node = ir.node("Identity", [value])
            node.outputs[0].type = value.type
            model.graph.append(node)
            model.graph.outputs[index] = value = node.outputs[0]
        _claim(model, value, spec.name)
        value.shape = ir.Shape(spec.shape)


def _claim(model: ir.Model, value: ir.Value, name: str) -> None:
    """Name an input or output; anything inside the graph that has its name gets another."""
    move_aside(model, name, keep=value)
    value.name = name
