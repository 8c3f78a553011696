"""Experts in int8 or int4: each layer becomes one op, QMoE or the CPU plugin's own, whichever is faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError, choices_text
from ..graph.functions import attach_functions
from ..ops import OPS
from ..ops.quantization import KINDS
from ..schema import Decision, MoELayer
from .base import Pass, PassContext
from .expert_form import replace_output
from .qmoe import INT8_ACTIVATIONS, MICROSOFT, QuantizedExperts, qmoe_nodes, quantize_experts
from .quantized_choice import LOWERINGS, Plan, make_plan, qmoe_activation
from .quantized_op import OP, PackedExperts, op_attributes, op_nodes, pack_experts
from .quantized_times import PLUGIN, QMOE

if TYPE_CHECKING:
    import onnx_ir as ir

_OTHER_BODY = "it differs in form from the model's other experts; one body cannot serve both"
_CHOICE = {QMOE: "one QMoE op with the model's own routing", PLUGIN: f"one {OP} op of the CPU plugin"}


class QuantizeExperts(Pass):
    """``option quantize``: ``int8`` or ``int4``; without it nothing happens. ``option quantized_lowering``:
    ``qmoe``, ``plugin`` or ``auto``. A layer that no op can express keeps its float weights, and a decision
    says why."""

    name = "quantize-experts"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        kind = context.options.get("quantize")
        if kind is None:
            return
        _check("quantize", kind, KINDS)
        _check("quantized_lowering", context.options.get("quantized_lowering", "auto"), LOWERINGS)
        stored: dict[tuple[Any, ...], QuantizedExperts | PackedExperts] = {}
        body: tuple[Any, ...] | None = None
        for layer in context.layers:
            plan = make_plan(context, layer, KINDS[kind])
            if isinstance(plan, Plan) and plan.op == PLUGIN:
                variant = OPS[OP].variant(_attributes(plan, KINDS[kind]))
                if body is None or variant == body:
                    body = variant
                else:
                    plan = make_plan(context, layer, KINDS[kind], _OTHER_BODY)
            if isinstance(plan, str):
                context.decisions.append(Decision(f"{layer.name}: experts", f"not {kind}: float", plan))
            else:
                _lower(context, layer, kind, plan, stored)
        if context.quantized:
            common.RemoveUnusedNodesPass()(context.model)
            if body is not None:
                attach_functions(context.model, context.opset)
        elif context.layers:
            context.notes.append(f"{kind} was asked for, and no MoE layer could be quantised")
        else:
            context.notes.append(
                f"{kind} was asked for, and the model has no MoE layer; nothing is quantised"
            )


def _check(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise UsageError(f"{name}: unknown value {value!r}; {choices_text(str(value), choices)}")


def _attributes(plan: Plan, bits: int) -> dict[str, Any]:
    return op_attributes(plan.form.attributes, bits=bits, block=plan.block)


def _lower(
    context: PassContext,
    layer: MoELayer,
    kind: str,
    plan: Plan,
    stored: dict[tuple[Any, ...], QuantizedExperts | PackedExperts],
) -> None:
    form, graph, bits = plan.form, context.model.graph, KINDS[kind]
    values = [*form.weights, *form.biases]
    key = (plan.op, *(id(v) for v in values))
    if key not in stored:  # layers that share their weights share the codes
        arrays = [None if v is None or v.const_value is None else v.const_value.numpy() for v in values]
        up, down, up_bias, down_bias = arrays
        assert up is not None and down is not None
        make = quantize_experts if plan.op == QMOE else pack_experts
        stored[key] = make(up, down, up_bias, down_bias, form.attributes, bits=bits, block=plan.block)
    experts = stored[key]
    constants = _Constants(graph, f"experts.{list(stored).index(key)}.{kind}")
    inputs = form.nodes.hidden, form.nodes.expert_ids, form.nodes.weights
    if isinstance(experts, PackedExperts):
        nodes = op_nodes(*inputs, experts, _attributes(plan, bits), constant=constants.get)
    else:
        nodes = qmoe_nodes(
            *inputs,
            experts,
            qmoe_activation(form.attributes),
            top_k=layer.top_k,
            accuracy_level=INT8_ACTIVATIONS,
            constant=constants.get,
        )
        graph.opset_imports.setdefault(MICROSOFT, 1)
    replace_output(graph, form.nodes, nodes)
    context.float32_weights |= constants.names
    context.quantized = (*context.quantized, layer.index)
    before = sum(v.const_value.nbytes for v in form.weights if v.const_value is not None)
    proof = ", QMoE of this form was run beside its reference" if plan.op == QMOE else ""
    context.decisions.append(
        Decision(
            f"{layer.name}: experts",
            f"{kind} in blocks of {plan.block}, {_CHOICE[plan.op]}",
            f"its activation is {form.attributes['activation']}{proof}; {experts.nbytes / 2**20:.1f} MiB "
            f"instead of {before / 2**20:.1f} MiB; {plan.why}",
            plan.others,
            plan.measured_ms,
        )
    )


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
