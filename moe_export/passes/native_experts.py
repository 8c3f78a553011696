"""Each MoE layer's experts as plain ONNX nodes that TensorRT builds, with no plugin."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..errors import ExportError, UsageError, choices_text
from ..graph.functions import attach_functions
from ..ops import DOMAIN
from ..schema import Alternative, Decision, MoELayer, TensorSpec
from .base import Pass, PassContext
from .expert_form import ExpertForm, find_form, replace_output
from .native_call import drop_unused, put_function
from .native_choice import Choice, choose
from .native_ops import lowered, remaining
from .native_text import LOWERINGS, NativeForm, native_function, uses_buckets
from .trt_moe import LOWERING as TRT_MOE
from .trt_moe import trt_moe_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

CAPACITY_INPUT = "moe_capacity"
"""Input int32 [capacity]; its length is the rows per expert's bucket, its values do not matter."""
LOAD_OUTPUT = "moe_max_load"
"""Output int32 [buckets]: tokens of the fullest expert. More than the capacity: the run is void."""
_FLOATS = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


class NativeExperts(Pass):
    """``option native_lowering``: ``auto``, or one of :data:`native_text.LOWERINGS` or ``trt_moe``
    (TensorRT's own layer, :mod:`trt_moe`) for every layer.

    Options ``sm`` (GPUs to predict times for; the first counts) and ``max_tokens`` (of one run; None: any)
    decide with the cost model. Layers that a pass before this one fused are left alone. Where the activation
    is not proven, ``auto`` lowers the layer's ops one by one (:mod:`native_ops`), and any other value is
    refused (:class:`UsageError`).

    Where a layer has buckets, the model gets the input :data:`CAPACITY_INPUT` (role ``capacity``) and the
    output :data:`LOAD_OUTPUT` (role ``load``), both in ``context.io``; the host runs again with a larger
    capacity when the load is more (:mod:`moe_export.runtime.capacity`).
    """

    name = "native-experts"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        wanted = str(context.options.get("native_lowering", "auto"))
        known = ("auto", *LOWERINGS, TRT_MOE)
        if wanted not in known:
            raise UsageError(f"native_lowering: unknown value {wanted!r}; {choices_text(wanted, known)}")
        loads: list[ir.Value] = []
        for layer in context.layers:
            if layer.index in (*context.fused, *context.quantized):
                continue
            found = find_form(context, layer.name)
            form = found if isinstance(found, str) else native_form(layer, found, context.dtype)
            if isinstance(form, str) or isinstance(found, str):
                if wanted != "auto":
                    raise UsageError(
                        f"native_lowering: {wanted} is not for layer {layer.name!r}: {form}; take auto, "
                        "which lowers it op by op"
                    )
                context.decisions.append(
                    Decision(
                        f"{layer.name}: experts",
                        "native: op by op",
                        f"{form}; dispatch, both products and combine are lowered apart",
                        (Alternative("native: both", "needs the whole layer's form"),),
                    )
                )
                continue
            choice = choose(form, wanted, context.options.get("sm") or (), context.options.get("max_tokens"))
            loads += _replace(context, layer, found, form, choice)
            context.fused = (*context.fused, layer.index)
            context.decisions.append(_decision(layer, found, choice))
        loads += _one_by_one(context)
        if loads:
            _add_load(context, loads)
        common.RemoveUnusedNodesPass()(context.model)
        attach_functions(context.model, context.opset)


def native_form(layer: MoELayer, found: ExpertForm, computed: str) -> NativeForm | str:
    """What the lowering's text depends on, or why there is none."""
    hidden = found.nodes.hidden
    dtype = _FLOATS.get(hidden.dtype.name) if hidden.dtype is not None else None
    stored = {_FLOATS.get(w.dtype.name) if w.dtype is not None else None for w in found.weights}
    weight_dtype = stored.pop()
    if dtype is None or weight_dtype is None or stored:
        return f"its tokens and both its weights are not of one of {', '.join(_FLOATS.values())}"
    return NativeForm(
        found.attributes,
        layer.top_k,
        layer.hidden_size,
        layer.intermediate_size,
        dtype,
        weight_dtype,
        bool(found.nodes.dispatch.attributes["drops"].as_int()),
        computed,
        layer.num_experts,
    )


def _replace(
    context: PassContext, layer: MoELayer, found: ExpertForm, form: NativeForm, choice: Choice
) -> list[ir.Value]:
    """Put the lowering in place of the layer's nodes. Returns its load, where it has buckets."""
    nodes = found.nodes
    if choice.lowering == TRT_MOE:
        rows = (nodes.hidden, nodes.expert_ids, nodes.weights)
        made = trt_moe_nodes(
            context.model, form, rows, found.weights, f"moe.{layer.index}.experts", context.opset
        )
        replace_output(context.model.graph, nodes, made)
        drop_unused(context.model, nodes.combine)
        return []
    function = native_function(
        form, choice.lowering, choice.threshold, context.opset, f"moe.{layer.index}.experts"
    )
    inputs: list[ir.Value | None] = [nodes.hidden, nodes.expert_ids, nodes.weights, *found.weights]
    inputs += [bias for bias in found.biases if bias is not None]
    name = None
    if uses_buckets(choice.lowering):
        inputs.append(_capacity(context))
        name = f"moe.{layer.index}.max_load"
    load = put_function(context.model, function, inputs, [nodes.output], nodes.combine, load=name)
    drop_unused(context.model, nodes.combine)
    return [] if load is None else [load]


def _one_by_one(context: PassContext) -> list[ir.Value]:
    """Lower the Dispatch, GroupedMatMul and Combine nodes that are left. Returns their loads.

    Raises:
        ExportError: one of them cannot be lowered.
    """
    loads = []
    for number, node in enumerate(remaining(context)):
        made = lowered(node, context, f"moe.{node.op_type}.{number}")
        if isinstance(made, str):
            raise ExportError(f"{made}, so TensorRT cannot run it; build for onnxruntime or portable")
        inputs, name = list(node.inputs), None
        if node.op_type == "GroupedMatMul":
            inputs.append(_capacity(context))
            name = f"moe.product.{number}.max_load"
        load = put_function(context.model, made, inputs, list(node.outputs), node, load=name)
        drop_unused(context.model, node)
        if load is not None:
            loads.append(load)
    return loads


def _capacity(context: PassContext) -> ir.Value:
    """The input that sizes the buckets; made on first use."""
    import onnx_ir as ir

    for value in context.model.graph.inputs:
        if value.name == CAPACITY_INPUT:
            return value
    value = ir.Value(name=CAPACITY_INPUT, shape=ir.Shape(["capacity"]), type=ir.TensorType(ir.DataType.INT32))
    context.model.graph.inputs.append(value)
    spec = TensorSpec(CAPACITY_INPUT, "int32", ("capacity",), "capacity")
    context.io = dataclasses.replace(context.io, inputs=(*context.io.inputs, spec))
    return value


def _add_load(context: PassContext, loads: list[ir.Value]) -> None:
    import onnx_ir as ir

    graph = context.model.graph
    node = ir.node("Concat", loads, attributes={"axis": 0})
    graph.append(node)
    plan = context.options.get("expert_parallel")
    if plan is not None:
        # A rank that runs again does so with all others: they must see one load.
        kinds = (ir.DataType.FLOAT, ir.DataType.INT32)
        wide = ir.node("Cast", [node.outputs[0]], attributes={"to": int(kinds[0])})
        options = {"ranks": plan.ranks, "reduce": "max", "layer": "load"}
        most = ir.node("AllReduce", [wide.outputs[0]], attributes=options, domain=DOMAIN)
        wide.outputs[0].type = most.outputs[0].type = ir.TensorType(kinds[0])
        node = ir.node("Cast", [most.outputs[0]], attributes={"to": int(kinds[1])})
        graph.extend([wide, most, node])
    out = node.outputs[0]
    out.name, out.shape, out.type = LOAD_OUTPUT, ir.Shape([len(loads)]), ir.TensorType(ir.DataType.INT32)
    graph.outputs.append(out)
    spec = TensorSpec(LOAD_OUTPUT, "int32", (len(loads),), "load")
    context.io = dataclasses.replace(context.io, outputs=(*context.io.outputs, spec))


def _decision(layer: MoELayer, found: ExpertForm, choice: Choice) -> Decision:
    activation = found.attributes["activation"]
    text = {
        "gather": "native: gather",
        "buckets": "native: buckets",
        "both": f"native: gather up to {choice.threshold} tokens, buckets above",
        "dense": "native: dense",
        TRT_MOE: "native: TRT_MoE, TensorRT's own layer",
    }[choice.lowering]
    reason = f"{choice.reason}; its activation is {activation}, proven by running its nodes"
    return Decision(f"{layer.name}: experts", text, reason, choice.alternatives)
