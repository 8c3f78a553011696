"""The layout of quantised expert weights that the CPU plugin reads: panels of 64 columns, as ``packing.py``.

Of one expert's matrix [in, out] (``in`` = H for up, I for down), cut into P panels:

- codes, 8 bits: int8 [E, P, in, 64], signed: a weight is ``code * scale``.
- codes, 4 bits: uint8 [E, P, in / 8, 64, 4]. The four bytes of a column are a little-endian word of eight
  codes, the first input's in the lowest bits, each in two's complement of four bits: for each vector of
  columns a kernel loads words once and shifts them for eight inputs.
- scales: float32 [E, P, in / block, 64], the same panels one block of inputs a row.

Codes and scales are those of ``quantization.py`` (there codes have a zero point, which is taken off here), so
both stand for the same weights. Panels past the last column hold zeros.
``plugins/cpu/kernels/expert_mlp.h`` says the same for C++.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .packing import PANEL_COLUMNS, pack_down, pack_up, unpack_down, unpack_up
from .quantization import Quantized

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORD_STEPS = 8
"""Inputs whose 4-bit codes of one column share a word; blocks are multiples of it."""


@dataclass(frozen=True)
class PackedMatrix:
    """Codes and scales of a stack of matrices, as QuantizedExpertMLP takes them."""

    codes: NDArray[Any]
    scales: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return int(self.codes.nbytes + self.scales.nbytes)


def pack_quantized_up(up: Quantized, *, gated: bool = True, layout: str = "concatenated") -> PackedMatrix:
    """Pack the up matrices [E, 2I or I, H] that :func:`~moe_export.ops.quantization.quantize` made.

    ``layout`` (gated only): how gate and up lie in ``up``.

    Raises:
        UsageError: an odd number of gate and up rows, an unknown layout, or a block that is no multiple of 8.
    """
    return PackedMatrix(
        _words(pack_up(_signed(up), gated=gated, layout=layout), up),
        pack_up(up.scales, gated=gated, layout=layout),
    )


def pack_quantized_down(down: Quantized) -> PackedMatrix:
    """Pack the down matrices [E, H, I]; see :func:`pack_quantized_up`."""
    return PackedMatrix(_words(pack_down(_signed(down)), down), pack_down(down.scales))


def unpack(
    codes: NDArray[Any], scales: NDArray[np.float32], columns: int, *, gated: bool
) -> NDArray[np.float64]:
    """The weights [E, columns, in] that packed codes and scales stand for; gate rows first.

    Raises:
        UsageError: shapes that do not go together.
    """
    import numpy as np

    plain = _plain(codes)
    blocks = scales.shape[2] if scales.ndim == 4 else 0
    if not blocks or plain.shape[2] % blocks:
        raise UsageError(f"scales of shape {scales.shape} do not go with codes of shape {codes.shape}")
    wide = np.repeat(scales.astype(np.float64), plain.shape[2] // blocks, axis=2)
    if wide.shape != plain.shape:
        raise UsageError(f"scales of shape {scales.shape} do not go with codes of shape {codes.shape}")
    panels = plain.astype(np.float64) * wide
    return unpack_up(panels, columns // 2, gated=True) if gated else unpack_down(panels, columns)


def _signed(quantized: Quantized) -> NDArray[np.int8]:
    """Codes without their zero point: int8 [E, N, D]."""
    import numpy as np

    if quantized.block % WORD_STEPS:
        raise UsageError(f"blocks of {quantized.block}; packed codes need a multiple of {WORD_STEPS}")
    codes = quantized.codes
    if quantized.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    return (codes.astype(np.int16) - 2 ** (quantized.bits - 1)).astype(np.int8)


def _words(panels: NDArray[np.int8], quantized: Quantized) -> NDArray[Any]:
    """Panels int8 [E, P, D, 64] as they are stored for the number of bits."""
    import numpy as np

    if quantized.bits == 8:
        return panels
    experts, count, depth, _ = panels.shape
    nibbles = panels.view(np.uint8) & 15
    pairs = nibbles.reshape(experts, count, depth // WORD_STEPS, WORD_STEPS // 2, 2, PANEL_COLUMNS)
    bytes_ = pairs[:, :, :, :, 0] | (pairs[:, :, :, :, 1] << 4)
    return np.ascontiguousarray(bytes_.swapaxes(3, 4))


def _plain(codes: NDArray[Any]) -> NDArray[np.int8]:
    """Signed codes int8 [E, P, D, 64] of either form."""
    import numpy as np

    if codes.dtype == np.int8 and codes.ndim == 4 and codes.shape[3] == PANEL_COLUMNS:
        return codes
    if codes.dtype != np.uint8 or codes.ndim != 5 or codes.shape[3:] != (PANEL_COLUMNS, WORD_STEPS // 2):
        raise UsageError(
            f"codes {codes.dtype} {codes.shape}; expected int8 [E, P, in, 64] or uint8 [E, P, in / 8, 64, 4]"
        )
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:4], WORD_STEPS)
    signed = (nibbles ^ 8).astype(np.int8) - np.int8(8)
    steps = signed.swapaxes(3, 4)
    return np.ascontiguousarray(steps.reshape(*codes.shape[:2], -1, PANEL_COLUMNS))


__all__ = ["WORD_STEPS", "PackedMatrix", "pack_quantized_down", "pack_quantized_up", "unpack"]
