"""Store float32 weights in bfloat16, with a cast back where they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph.expert_tensors import SCALE_OF
from ..ops import DOMAIN
from ..schema import Decision
from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir

SMALLEST = 1024
"""Fewer elements than this stay float32: norms and biases are small and lose precision for nothing."""
_EXPERT_WEIGHTS = (3, 4)
"""ExpertMLP's inputs ``up`` and ``down``, which it reads in bfloat16; both have one dtype."""


class BFloat16Weights(Pass):
    """bfloat16 models: weights in bfloat16, arithmetic in float32, as the CPU has no bfloat16 kernels."""

    name = "bfloat16-weights"

    def _run(self, context: PassContext) -> None:
        if context.dtype != "bfloat16":
            return
        import onnx_ir as ir

        graph = context.model.graph
        experts = [n for n in graph if n.domain == DOMAIN and n.op_type == "ExpertMLP"]
        pairs = [[node.inputs[i] for i in _EXPERT_WEIGHTS] for node in experts]
        whole = {id(v) for pair in pairs for v in pair if not any(_kept(w, context) for w in pair)}
        apart = {id(v) for pair in pairs for v in pair} - whole
        count = size = direct = 0
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or id(value) in apart:
                continue
            if _kept(value, context) or (tensor.size < SMALLEST and id(value) not in whole):
                continue
            stored = _stored(value, tensor)
            graph.register_initializer(stored)
            count, size = count + 1, size + int(tensor.size)
            for node, index in list(value.uses()):
                if id(value) in whole and node.op_type == "ExpertMLP":
                    node.replace_input_with(index, stored)
            name = value.name
            assert name is not None
            if list(value.uses()):
                cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value})
                cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, ir.DataType.FLOAT
                graph.insert_before(_first(graph), cast)
                value.replace_all_uses_with(cast.outputs[0])
                cast.outputs[0].name = f"{name}.float32"
            else:
                direct += 1
            del graph.initializers[name]
        context.decisions.append(
            Decision(
                subject="weights",
                choice="stored in bfloat16, cast to float32 at use",
                reason="ONNX Runtime's CPU provider has no bfloat16 kernels for MatMul and norms",
            )
        )
        read = f"; {direct} of them are expert weights, read as they are" if direct else ""
        context.notes.append(
            f"{count} weights ({size} elements) are stored in bfloat16 and cast to float32; tensors of "
            f"fewer than {SMALLEST} elements stay float32{read}"
        )


def _kept(value: ir.Value | None, context: PassContext) -> bool:
    if value is None or value.name in context.float32_weights:
        return True
    return value.const_value is not None and SCALE_OF in value.const_value.meta


def _stored(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    """Rounded when it is written, so that no second copy of all weights is held."""
    import ml_dtypes
    import onnx_ir as ir

    from ..graph.expert_stacks import ExpertStack

    name = f"{value.name}.bfloat16"
    rounded: ir.LazyTensor
    if isinstance(tensor, ExpertStack):
        rounded = tensor.each(
            lambda array: array.astype(ml_dtypes.bfloat16),
            tensor.shape.numpy()[1:],
            name,
            ir.DataType.BFLOAT16,
        )
    else:
        rounded = ir.LazyTensor(
            lambda: ir.tensor(tensor.numpy().astype(ml_dtypes.bfloat16)),
            dtype=ir.DataType.BFLOAT16,
            shape=ir.Shape(list(value.shape or ())),
            name=name,
        )
    stored = ir.Value(name=name, const_value=rounded)
    stored.dtype, stored.shape = ir.DataType.BFLOAT16, value.shape
    return stored


def _first(graph: ir.Graph) -> ir.Node:
    return next(iter(graph))
