"""Store float32 weights in bfloat16, with a cast back where they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..schema import Decision
from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir

SMALLEST = 1024
"""Fewer elements than this stay float32: norms and biases are small and lose precision for nothing."""


class BFloat16Weights(Pass):
    """bfloat16 models: weights in bfloat16, arithmetic in float32, as the CPU has no bfloat16 kernels."""

    name = "bfloat16-weights"

    def _run(self, context: PassContext) -> None:
        if context.dtype != "bfloat16":
            return
        import ml_dtypes
        import onnx_ir as ir

        graph = context.model.graph
        count = size = 0
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
                continue
            if value.name in context.float32_weights:
                continue
            stored = _stored(value, tensor.numpy().astype(ml_dtypes.bfloat16))
            graph.register_initializer(stored)
            cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value})
            cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, ir.DataType.FLOAT
            graph.insert_before(_first(graph), cast)
            value.replace_all_uses_with(cast.outputs[0])
            name = value.name
            assert name is not None
            del graph.initializers[name]
            cast.outputs[0].name = f"{name}.float32"
            count, size = count + 1, size + int(tensor.size)
        context.decisions.append(
            Decision(
                subject="weights",
                choice="stored in bfloat16, cast to float32 at use",
                reason="ONNX Runtime's CPU provider has no bfloat16 kernels for MatMul and norms",
            )
        )
        context.notes.append(
            f"{count} weights ({size} elements) are stored in bfloat16 and cast to float32; tensors of "
            f"fewer than {SMALLEST} elements stay float32"
        )


def _stored(value: ir.Value, array: object) -> ir.Value:
    import onnx_ir as ir

    stored = ir.Value(name=f"{value.name}.bfloat16", const_value=ir.tensor(array))
    stored.dtype, stored.shape = ir.DataType.BFLOAT16, value.shape
    return stored


def _first(graph: ir.Graph) -> ir.Node:
    return next(iter(graph))
