"""The packed layout of expert weights that the CPU plugin reads fastest: panels of 64 columns.

Written for one expert as a matrix [in, out] (``in`` = H for up, I for down):

- ``down`` [E, H, I] becomes [E, D, I, 64] with D = ceil(H / 64): panel *d*, row *i* holds columns 64 d to
  64 d + 63.
- ``up``, not gated, becomes [E, U, H, 64] with U = ceil(I / 64), in the same way.
- ``up``, gated, becomes [E, U, H, 64] with U = ceil(I / 32): panel *u*, row *h* holds gate columns 32 u to
  32 u + 31, then up columns 32 u to 32 u + 31, so that the activation finds both in one piece.

Zeros fill the last panel. The element type stays (float32, float16, bfloat16) and values are copied, so
unpacking gives the same bits. A panel is one contiguous piece of memory: the kernel reads it once, from start
to end.
``plugins/cpu/kernels/expert_mlp.h`` says the same for C++.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .expert_mlp import LAYOUTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

PANEL_COLUMNS = 64
PANEL_PAIRS = 32


def up_panels(intermediate: int, gated: bool) -> int:
    """U: panels of a packed up matrix."""
    return -(-intermediate // (PANEL_PAIRS if gated else PANEL_COLUMNS))


def down_panels(hidden: int) -> int:
    """D: panels of a packed down matrix."""
    return -(-hidden // PANEL_COLUMNS)


def pack_up(
    up: NDArray[Any],
    *,
    gated: bool = True,
    layout: str = "concatenated",
    transposed: bool = False,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """``up`` [E, 2I or I, H] ([E, H, 2I or I] when ``transposed``) → [E, U, H, 64].

    ``out`` takes the result where given (for example a memory-mapped file); one expert at a time is copied.

    Raises:
        UsageError: wrong shape, an odd number of gate and up columns, an unknown layout, or an ``out`` that
            does not fit.
    """
    _check_layout(layout)
    experts, depth, columns = _stack_shape("up", up, transposed)
    if gated and columns % 2:
        raise UsageError(f"up: {columns} gate and up columns; expected an even number")
    intermediate = columns // 2 if gated else columns
    out = _output("up", out, (experts, up_panels(intermediate, gated), depth, PANEL_COLUMNS), up.dtype)
    for e in range(experts):
        matrix = up[e] if transposed else up[e].T
        if gated:
            gate, linear = _split(matrix, layout)
            _fill(out[e][:, :, :PANEL_PAIRS], gate)
            _fill(out[e][:, :, PANEL_PAIRS:], linear)
        else:
            _fill(out[e], matrix)
    return out


def unpack_up(
    packed: NDArray[Any],
    intermediate: int,
    *,
    gated: bool = True,
    layout: str = "concatenated",
    transposed: bool = False,
) -> NDArray[Any]:
    """The inverse of :func:`pack_up`: [E, U, H, 64] → [E, 2I or I, H] ([E, H, 2I or I] when ``transposed``).

    Raises:
        UsageError: wrong shape, or ``intermediate`` does not go with the number of panels.
    """
    import numpy as np

    _check_layout(layout)
    experts, depth = _packed_shape("up", packed, up_panels(intermediate, gated), f"I = {intermediate}")
    columns = 2 * intermediate if gated else intermediate
    out = np.empty((experts, depth, columns), packed.dtype)
    for e in range(experts):
        if gated:
            gate, linear = _split(out[e], layout)
            gate[...] = _columns(packed[e][:, :, :PANEL_PAIRS], intermediate)
            linear[...] = _columns(packed[e][:, :, PANEL_PAIRS:], intermediate)
        else:
            out[e] = _columns(packed[e], intermediate)
    return out if transposed else np.ascontiguousarray(np.swapaxes(out, 1, 2))


def pack_down(
    down: NDArray[Any], *, transposed: bool = False, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """``down`` [E, H, I] ([E, I, H] when ``transposed``) → [E, D, I, 64]; ``out`` as in :func:`pack_up`.

    Raises:
        UsageError: wrong shape, or an ``out`` that does not fit.
    """
    experts, depth, hidden = _stack_shape("down", down, transposed)
    out = _output("down", out, (experts, down_panels(hidden), depth, PANEL_COLUMNS), down.dtype)
    for e in range(experts):
        _fill(out[e], down[e] if transposed else down[e].T)
    return out


def unpack_down(packed: NDArray[Any], hidden: int, *, transposed: bool = False) -> NDArray[Any]:
    """The inverse of :func:`pack_down`: [E, D, I, 64] → [E, H, I] ([E, I, H] when ``transposed``).

    Raises:
        UsageError: wrong shape, or ``hidden`` does not go with the number of panels.
    """
    import numpy as np

    experts, depth = _packed_shape("down", packed, down_panels(hidden), f"H = {hidden}")
    out = np.empty((experts, depth, hidden), packed.dtype)
    for e in range(experts):
        out[e] = _columns(packed[e], hidden)
    return out if transposed else np.ascontiguousarray(np.swapaxes(out, 1, 2))


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise UsageError(f"layout: unknown value {layout!r}; expected one of {', '.join(LAYOUTS)}")


def _stack_shape(name: str, weight: NDArray[Any], transposed: bool) -> tuple[int, int, int]:
    """E, in, out of a stack of matrices."""
    if weight.ndim != 3 or 0 in weight.shape:
        raise UsageError(f"{name}: shape {weight.shape}; expected three dimensions, none of them 0")
    experts, a, b = weight.shape
    return (experts, a, b) if transposed else (experts, b, a)


def _packed_shape(name: str, packed: NDArray[Any], panels: int, why: str) -> tuple[int, int]:
    """E and in of packed weights."""
    if packed.ndim != 4 or packed.shape[1] != panels or packed.shape[3] != PANEL_COLUMNS:
        raise UsageError(
            f"packed {name}: shape {packed.shape}; expected [E, {panels}, in, {PANEL_COLUMNS}] for {why}"
        )
    return packed.shape[0], packed.shape[2]


def _output(name: str, out: NDArray[Any] | None, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    import numpy as np

    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype:
        raise UsageError(f"out of packed {name}: {out.dtype} {out.shape}; expected {dtype} {shape}")
    return out


def _split(matrix: NDArray[Any], layout: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Views of the gate and the up columns of a matrix [in, 2I]."""
    if layout == "interleaved":
        return matrix[:, 0::2], matrix[:, 1::2]
    half = matrix.shape[1] // 2
    return matrix[:, :half], matrix[:, half:]


def _fill(panels: NDArray[Any], matrix: NDArray[Any]) -> None:
    """Write a matrix [in, out] to panels [P, in, width], zeros after the last column."""
    width = panels.shape[2]
    whole, rest = divmod(matrix.shape[1], width)
    panels[:whole] = matrix[:, : whole * width].reshape(matrix.shape[0], whole, width).swapaxes(0, 1)
    if rest:
        panels[whole, :, :rest] = matrix[:, whole * width :]
        panels[whole, :, rest:] = 0


def _columns(panels: NDArray[Any], columns: int) -> NDArray[Any]:
    """Panels [P, in, width] back to a matrix [in, columns]."""
    count, depth, width = panels.shape
    return panels.swapaxes(0, 1).reshape(depth, count * width)[:, :columns]


__all__ = [
    "PANEL_COLUMNS",
    "PANEL_PAIRS",
    "down_panels",
    "pack_down",
    "pack_up",
    "unpack_down",
    "unpack_up",
    "up_panels",
]
