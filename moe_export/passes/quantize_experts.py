"""Experts in int8 or int4: each layer whose form is proven becomes one ``com.microsoft.QMoE``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, choices_text
from ..ops.quantization import BLOCKS, KINDS, block_for
from ..schema import Alternative, Decision, MoELayer
from .base import Pass, PassContext
from .expert_form import ExpertForm, find_form, replace_output
from .qmoe import (
    INT8_ACTIVATIONS,
    MICROSOFT,
    QuantizedExperts,
    activation_attributes,
    qmoe_nodes,
    quantize_experts,
)
from .qmoe_proof import qmoe_problem
from .qmoe_times import compare_times

if TYPE_CHECKING:
    import onnx_ir as ir


class QuantizeExperts(Pass):
    """``option quantize``: ``int8`` or ``int4``; without it nothing happens. A layer that QMoE cannot express
    keeps its float weights, and a decision says why."""

    name = "quantize-experts"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        kind = context.options.get("quantize")
        if kind is None:
            return
        if kind not in KINDS:
            raise UsageError(f"quantize: unknown value {kind!r}; {choices_text(str(kind), KINDS)}")
        stored: dict[tuple[int, ...], QuantizedExperts] = {}
        for layer in context.layers:
            found = _plan(context, layer, KINDS[kind])
            if isinstance(found, str):
                context.decisions.append(Decision(f"{layer.name}: experts", f"not {kind}: float", found))
            else:
                self._lower(context, layer, kind, found, stored)
        if context.quantized:
            context.model.graph.opset_imports.setdefault(MICROSOFT, 1)
            common.RemoveUnusedNodesPass()(context.model)
        elif context.layers:
            context.notes.append(f"{kind} was asked for, and no MoE layer could be quantised")
        else:
            context.notes.append(
                f"{kind} was asked for, and the model has no MoE layer; nothing is quantised"
            )

    def _lower(
        self,
        context: PassContext,
        layer: MoELayer,
        kind: str,
        plan: _Plan,
        stored: dict[tuple[int, ...], QuantizedExperts],
    ) -> None:
        form, graph = plan.form, context.model.graph
        values = [*form.weights, *form.biases]
        key = tuple(id(v) for v in values)
        if key not in stored:  # layers that share their weights share the codes
            arrays = [None if v is None or v.const_value is None else v.const_value.numpy() for v in values]
            up, down, up_bias, down_bias = arrays
            assert up is not None and down is not None
            stored[key] = quantize_experts(
                up, down, up_bias, down_bias, form.attributes, bits=KINDS[kind], block=plan.block
            )
        experts = stored[key]
        first = list(stored).index(key)
        constants = _Constants(graph, f"experts.{first}.{kind}")
        nodes = qmoe_nodes(
            form.nodes.hidden,
            form.nodes.expert_ids,
            form.nodes.weights,
            experts,
            plan.activation,
            top_k=layer.top_k,
            accuracy_level=INT8_ACTIVATIONS,
            constant=constants.get,
        )
        replace_output(graph, form.nodes, nodes)
        context.float32_weights |= constants.names
        context.quantized = (*context.quantized, layer.index)
        before = sum(v.const_value.nbytes for v in form.weights if v.const_value is not None)
        comparison = compare_times(
            layer.num_experts, layer.top_k, form.attributes, experts, plan.activation, context.options
        )
        context.decisions.append(
            Decision(
                f"{layer.name}: experts",
                f"{kind} in blocks of {plan.block}, one QMoE op with the model's own routing",
                f"its activation is {form.attributes['activation']}, QMoE of this form was run beside its "
                f"reference; {experts.nbytes / 2**20:.1f} MiB instead of {before / 2**20:.1f} MiB; "
                f"{comparison.reason}",
                (Alternative("float", comparison.alternative, comparison.float_ms),),
                comparison.quantized_ms,
            )
        )


@dataclass(frozen=True)
class _Plan:
    form: ExpertForm
    activation: Mapping[str, Any]
    block: int


def _plan(context: PassContext, layer: MoELayer, bits: int) -> _Plan | str:
    """How the layer is quantised, or why it is not."""
    form = find_form(context, layer.name)
    if isinstance(form, str):
        return form
    activation = activation_attributes(form.attributes)
    if isinstance(activation, str):
        return activation
    block = block_for(layer.hidden_size, layer.intermediate_size)
    if block is None:
        sizes = f"{layer.hidden_size} and {layer.intermediate_size}"
        return f"its sizes {sizes} are not both multiples of {BLOCKS[-1]}, the smallest block"
    if layer.top_k > layer.num_experts:
        return f"it chooses {layer.top_k} of {layer.num_experts} experts"
    problem = qmoe_problem(
        form.attributes, bits=bits, block=block, top_k=layer.top_k, accuracy_level=INT8_ACTIVATIONS
    )
    return problem or _Plan(form, activation, block)


class _Constants:
    """Initializers by name below a prefix; one of a name is made once."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self._graph, self._prefix = graph, prefix
        self.names: frozenset[str] = frozenset()

    def get(self, name: str, array: Any) -> ir.Value:
        import onnx_ir as ir

        full = f"{self._prefix}.{name}"
        self.names |= {full}
        held = self._graph.initializers.get(full)
        if held is not None:
            return held
        tensor = ir.tensor(array, name=full)
        value = ir.Value(
            name=full, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
        )
        self._graph.register_initializer(value)
        return value
