"""Block-wise integer quantisation of expert weights: layout, formula, and the way back.

A matrix of an expert is [N, D] (``torch.nn.Linear``'s layout: N outputs, D inputs). Each row is cut along D
into blocks of ``block`` weights that share one float32 scale. With ``bits`` b and zero point z = 2^(b-1):

    code   = clip(round(weight / scale) + z, 0, 2^b - 1)
    weight = (code - z) * scale

The zero point is fixed (symmetric), so no other number is stored. A scale may be negative: it is chosen so
that the block's weight of largest magnitude has code 0, which is exact, as there is one code more below zero
than above. No weight is off by more than half a scale, save those beyond the largest code on the other side,
which are off by at most one. A block of zeros has scale 0.

Stacks of E matrices are stored as ``com.microsoft.QMoE`` reads them: codes uint8 [E, N, D * b / 8] (4 bits:
the weight of even index in the low half of a byte, that of odd index in the high half), scales float32
[E, N, D / block].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .expert_mlp import LAYOUTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = {"int8": 8, "int4": 4}
"""Name of a quantisation → bits per weight."""
BLOCK = 32
"""Weights per scale where the sizes allow it."""
BLOCKS = (32, 16)
"""Block sizes in the order in which they are tried."""


@dataclass(frozen=True)
class Quantized:
    """A stack of quantised matrices; the module's text says what the arrays hold."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int
    block: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return int(self.codes.nbytes + self.scales.nbytes)


def block_for(*depths: int) -> int | None:
    """The largest block size that divides all of ``depths``; None if none does."""
    return next((block for block in BLOCKS if all(d > 0 and d % block == 0 for d in depths)), None)


def quantize(weights: NDArray[Any], bits: int, block: int = BLOCK) -> Quantized:
    """Quantise a stack [E, N, D] of matrices.

    Raises:
        UsageError: not 4 or 8 bits, not three axes, D not a multiple of ``block``, or a weight that is not
            finite.
    """
    import numpy as np

    if bits not in KINDS.values():
        raise UsageError(f"quantisation: {bits} bits; expected one of {', '.join(map(str, KINDS.values()))}")
    if weights.ndim != 3:
        raise UsageError(f"quantisation: weights of shape {list(weights.shape)}; expected [E, N, D]")
    experts, rows, depth = weights.shape
    if block < 2 or depth % block:
        raise UsageError(f"quantisation: {depth} inputs are no multiple of the block size {block}")
    codes = np.empty((experts, rows, depth * bits // 8), np.uint8)
    scales = np.empty((experts, rows, depth // block), np.float32)
    for e in range(experts):
        blocks = np.asarray(weights[e], np.float32).reshape(rows, depth // block, block)
        if not np.isfinite(blocks).all():
            raise UsageError(f"quantisation: expert {e} has weights that are not finite")
        scales[e] = _scales(blocks, bits)
        plain = _codes(blocks, scales[e], bits).reshape(rows, depth)
        codes[e] = plain if bits == 8 else plain[:, 0::2] | (plain[:, 1::2] << 4)
    return Quantized(codes, scales, bits, block)


def dequantize(quantized: Quantized) -> NDArray[np.float64]:
    """The weights [E, N, D] that the codes stand for: the reference for every kernel that reads them."""
    import numpy as np

    codes = quantized.codes
    if quantized.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    scales = np.repeat(quantized.scales.astype(np.float64), quantized.block, axis=2)
    return np.asarray((codes.astype(np.float64) - 2 ** (quantized.bits - 1)) * scales)


def interleave(stack: NDArray[Any], layout: str) -> NDArray[Any]:
    """Gate and up of [E, 2I, ...] in pairs along axis 1: gate 0, up 0, gate 1, up 1, …

    ``layout``: how they lie in ``stack`` (ExpertMLP's attribute).

    Raises:
        UsageError: unknown layout, or an odd number of rows.
    """
    import numpy as np

    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; choices: {', '.join(LAYOUTS)}")
    if stack.shape[1] % 2:
        raise UsageError(f"{stack.shape[1]} gate and up rows; expected an even number")
    if layout == "interleaved":
        return stack
    gate, up = np.split(stack, 2, axis=1)
    return np.stack([gate, up], axis=2).reshape(stack.shape)


def _scales(blocks: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """The scale of each block of [N, B, block]: float32 [N, B]."""
    import numpy as np

    place = np.abs(blocks).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(blocks, place, axis=-1)[..., 0]
    return np.asarray(largest / np.float32(-(2 ** (bits - 1))), np.float32)


def _codes(blocks: NDArray[np.float32], scales: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """Codes uint8 [N, B, block]; the zero point where the scale is 0 (or so small that its inverse is not
    finite)."""
    import numpy as np

    top = 2 ** (bits - 1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1.0) / scales
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0.0))
    return np.clip(np.rint(blocks * inverse[..., None]) + top, 0, 2 * top - 1).astype(np.uint8)
