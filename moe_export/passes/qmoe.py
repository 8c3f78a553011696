"""The experts of a layer as ``com.microsoft.QMoE`` with the routing kept outside.

QMoE takes router logits, chooses experts itself and weighs them itself. Here the layer's own choice decides:

- ``router_probs`` is 1 at the experts the layer chose and 0 elsewhere, so QMoE's own top k are those. Where a
  token has fewer (dropped assignments, an expert named twice) QMoE takes others besides, the highest index
  first; their weight is 0.
- ``router_weights`` holds the layer's weights, added up per expert, 0 elsewhere. Without this input QMoE
  renormalises silently, whatever ``normalize_routing_weights`` says; with ``normalize_routing_weights`` 1 it
  renormalises these, too.
- QMoE computes zeros for a token whose weights are NaN, leaves out an expert of negative weight, and (with
  int8 activations) drops a NaN of the input. A guard makes such a token NaN: 0 * hidden and 0 * sqrt(weights)
  are added to its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ops.quantization import Quantized, interleave, quantize

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
INT8_ACTIVATIONS = 4
"""QMoE's accuracy_level with which 4-bit experts use int8 dot products, as 8-bit experts always do."""

Constant = Callable[[str, Any], Any]
"""Makes an initializer from a name and an array."""


@dataclass(frozen=True)
class QuantizedExperts:
    """A layer's weights as QMoE reads them: gate and up in pairs, biases float32 or None."""

    up: Quantized
    down: Quantized
    up_bias: NDArray[np.float32] | None
    down_bias: NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.up.nbytes + self.down.nbytes


def activation_attributes(attributes: Mapping[str, Any]) -> dict[str, Any] | str:
    """QMoE's attributes for ExpertMLP's ``activation``, or why there are none."""
    activation, gated = attributes["activation"], attributes["gated"]
    if gated and activation == "silu":
        return {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
    if gated and activation == "clamped_swiglu":
        return {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": float(attributes["alpha"]),
            "activation_beta": 1.0,
            "swiglu_limit": float(attributes["limit"]),
        }
    if gated:
        return f"QMoE has no gated {activation}"
    if activation == "gelu":
        return "QMoE's gelu is the tanh approximation, another function than this layer's"
    names = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu"}
    if activation not in names:
        return f"QMoE has no {activation}"
    return {"activation_type": names[activation], "swiglu_fusion": 0}


def quantize_experts(
    up: NDArray[Any],
    down: NDArray[Any],
    up_bias: NDArray[Any] | None,
    down_bias: NDArray[Any] | None,
    attributes: Mapping[str, Any],
    *,
    bits: int,
    block: int,
) -> QuantizedExperts:
    """Quantise ExpertMLP's weights [E, 2I or I, H] and [E, H, I] (the other way round when ``transposed``).

    Raises:
        UsageError: a size that is no multiple of ``block``, or weights that are not finite.
    """
    import numpy as np

    if attributes["transposed"]:
        up, down = up.swapaxes(1, 2), down.swapaxes(1, 2)
    if attributes["gated"]:
        up = interleave(up, attributes["layout"])
        up_bias = None if up_bias is None else interleave(up_bias, attributes["layout"])
    return QuantizedExperts(
        quantize(up, bits, block),
        quantize(down, bits, block),
        None if up_bias is None else np.ascontiguousarray(up_bias, np.float32),
        None if down_bias is None else np.ascontiguousarray(down_bias, np.float32),
    )


def qmoe_nodes(
    hidden: ir.Value,
    expert_ids: ir.Value,
    weights: ir.Value,
    experts: QuantizedExperts,
    activation: Mapping[str, Any],
    *,
    top_k: int,
    accuracy_level: int,
    constant: Constant,
) -> list[ir.Node]:
    """Nodes from ``hidden`` [T, H], ``expert_ids`` int32 [T, K] and ``weights`` [T, K] to the layer's output;
    the last one's result is that, in the dtype of ``hidden``."""
    import numpy as np
    import onnx_ir as ir

    made: list[ir.Node] = []

    def node(op: str, inputs: list[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        made.append(ir.node(op, inputs, attributes=attributes, domain=domain))
        return made[-1].outputs[0]

    def as_float(value: ir.Value) -> ir.Value:
        if value.dtype == ir.DataType.FLOAT:
            return value
        return node("Cast", [value], to=ir.DataType.FLOAT.value)

    count, _, scale_count = experts.up.scales.shape
    size = scale_count * experts.up.block
    last = constant("last_axis", np.array([-1], np.int64))
    middle = constant("middle_axis", np.array([1], np.int64))
    rows, shares = as_float(hidden), as_float(weights)
    # [T, K, E]: 1 where the k-th choice is that expert. Ids outside [0, E) are nowhere.
    columns = node("Unsqueeze", [expert_ids, last])
    hits = node("Equal", [columns, constant("experts", np.arange(count, dtype=np.int32))])
    chosen = node("Cast", [hits], to=ir.DataType.FLOAT.value)
    # Not a constant of ones: ONNX Runtime does not broadcast one against no token.
    valid = node("GreaterOrEqual", [expert_ids, constant("zero", np.zeros((), np.int32))])
    ones = node("Unsqueeze", [node("Cast", [valid], to=ir.DataType.FLOAT.value), middle])
    selection = node("Squeeze", [node("MatMul", [ones, chosen]), middle])
    share_row = node("Unsqueeze", [shares, middle])
    shares_dense = node("Squeeze", [node("MatMul", [share_row, chosen]), middle])
    bias_1 = None if experts.up_bias is None else constant("up_bias", experts.up_bias)
    bias_2 = None if experts.down_bias is None else constant("down_bias", experts.down_bias)
    inputs: list[ir.Value | None] = [rows, selection]
    inputs += [constant("up_codes", experts.up.codes), constant("up_scales", experts.up.scales), bias_1]
    inputs += [constant("down_codes", experts.down.codes), constant("down_scales", experts.down.scales)]
    inputs += [bias_2, *[None] * 6, shares_dense]
    mixed = node(
        "QMoE",
        inputs,
        MICROSOFT,
        k=top_k,
        expert_weight_bits=experts.up.bits,
        block_size=experts.up.block,
        normalize_routing_weights=0,
        quant_type="int",
        weights_prepacked=0,
        accuracy_level=accuracy_level,
        **activation,
    )
    guard_hidden = node("MatMul", [rows, constant("hidden_zeros", np.zeros((size, 1), np.float32))])
    roots = node("Sqrt", [shares])
    guard_weights = node("MatMul", [roots, constant("weight_zeros", np.zeros((top_k, 1), np.float32))])
    guard = node("Add", [guard_hidden, guard_weights])
    out = node("Add", [mixed, guard])
    if hidden.dtype != ir.DataType.FLOAT and hidden.dtype is not None:
        node("Cast", [out], to=hidden.dtype.value)
    return made
