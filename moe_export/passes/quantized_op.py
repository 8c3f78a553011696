"""The experts of a layer as one QuantizedExpertMLP node, which the CPU plugin runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ops import DOMAIN, OPS
from ..ops.quantization import quantize
from ..ops.quantized_packing import PackedMatrix, pack_quantized_down, pack_quantized_up
from .qmoe import Constant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

OP = "QuantizedExpertMLP"


@dataclass(frozen=True)
class PackedExperts:
    """A layer's weights as the op reads them; biases float32, gates before ups, or None."""

    up: PackedMatrix
    down: PackedMatrix
    up_bias: NDArray[np.float32] | None
    down_bias: NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.up.nbytes + self.down.nbytes


def op_attributes(attributes: Mapping[str, Any], *, bits: int, block: int) -> dict[str, Any]:
    """The op's attributes for ExpertMLP's ``attributes``."""
    shared = {a.name for a in OPS[OP].attributes} & {a.name for a in OPS["ExpertMLP"].attributes}
    given = {name: value for name, value in attributes.items() if name in shared}
    return OPS[OP].complete({**given, "bits": bits, "block": block})


def pack_experts(
    up: NDArray[Any],
    down: NDArray[Any],
    up_bias: NDArray[Any] | None,
    down_bias: NDArray[Any] | None,
    attributes: Mapping[str, Any],
    *,
    bits: int,
    block: int,
) -> PackedExperts:
    """Quantise and pack ExpertMLP's weights [E, 2I or I, H] and [E, H, I] (the other way round when
    ``transposed``), whatever the layout of gate and up.

    Raises:
        UsageError: a size that is no multiple of ``block``, or weights that are not finite.
    """
    import numpy as np

    if attributes["transposed"]:
        up, down = up.swapaxes(1, 2), down.swapaxes(1, 2)
    gated = bool(attributes["gated"])
    if up_bias is not None and gated and attributes["layout"] == "interleaved":
        up_bias = np.concatenate([up_bias[:, 0::2], up_bias[:, 1::2]], axis=1)
    return PackedExperts(
        pack_quantized_up(quantize(up, bits, block), gated=gated, layout=attributes["layout"]),
        pack_quantized_down(quantize(down, bits, block)),
        None if up_bias is None else np.ascontiguousarray(up_bias, np.float32),
        None if down_bias is None else np.ascontiguousarray(down_bias, np.float32),
    )


def op_nodes(
    hidden: ir.Value,
    expert_ids: ir.Value,
    weights: ir.Value,
    experts: PackedExperts,
    attributes: Mapping[str, Any],
    *,
    constant: Constant,
) -> list[ir.Node]:
    """Nodes from ``hidden`` [T, H], ``expert_ids`` int32 [T, K] and ``weights`` [T, K] to the layer's output,
    the last one's result, in the dtype of ``hidden``; ``attributes`` are the op's own."""
    import onnx_ir as ir

    made: list[ir.Node] = []
    if weights.dtype not in (None, ir.DataType.FLOAT):
        made.append(ir.node("Cast", [weights], attributes={"to": ir.DataType.FLOAT.value}))
        weights = made[-1].outputs[0]
    inputs: list[ir.Value | None] = [hidden, expert_ids, weights]
    inputs += [constant("up_codes", experts.up.codes), constant("up_scales", experts.up.scales)]
    inputs += [constant("down_codes", experts.down.codes), constant("down_scales", experts.down.scales)]
    if experts.up_bias is not None and experts.down_bias is not None:
        inputs += [constant("up_bias", experts.up_bias), constant("down_bias", experts.down_bias)]
    made.append(ir.node(OP, inputs, attributes=dict(attributes), domain=DOMAIN))
    return made
