"""Tile configurations of the five GPU kernels of a MoE layer.

A tile is what one thread block computes at a time. The lists are the only ones: kernels are compiled and
checked for them, and the cost model chooses from them (``moe_kernels.choose_tiles``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from moe_export.errors import UsageError, choices_text

KERNELS = ("router", "dispatch", "gate_up", "down", "combine")
"""In the order they run in."""

GEMMS = ("gate_up", "down")


@dataclass(frozen=True)
class Tile:
    """One configuration. Every block size is a power of two.

    ``rows``: tokens (router, combine) or rows of one expert (dispatch, gate_up, down: the three must agree).
    ``columns``: assignments read at once (dispatch), columns of the result (gate_up, down, combine).
    ``depth``: of the product, per step (gate_up, down). ``group``: blocks of rows that go through all columns
    together, so that weights are read from the cache (gate_up, down). ``warps``: of 32 threads each.
    ``stages``: of the product's software pipeline.
    """

    rows: int
    columns: int = 1
    depth: int = 1
    group: int = 1
    warps: int = 4
    stages: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "depth", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise UsageError(f"tile: {name} is {value}; expected a power of two")
        if self.warps > 16:
            raise UsageError(f"tile: warps is {self.warps}; expected at most 16")
        for name in ("group", "stages"):
            if getattr(self, name) < 1:
                raise UsageError(f"tile: {name} is {getattr(self, name)}; expected 1 or more")

    @property
    def threads(self) -> int:
        """Threads per block: block_x of the launch."""
        return 32 * self.warps

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        size = "x".join([str(self.rows), *(str(n) for n in (self.columns, self.depth) if n > 1)])
        return f"{size} w{self.warps}" + (f" s{self.stages}" if self.stages > 1 else "")


_GEMM_16 = (
    Tile(16, 64, 64, group=1, warps=4, stages=3),
    Tile(32, 64, 64, group=4, warps=4, stages=2),
    Tile(64, 64, 32, group=8, warps=4, stages=3),
    Tile(128, 64, 32, group=8, warps=8, stages=2),
)
_DOWN_16 = (*_GEMM_16[:3], Tile(128, 128, 32, group=8, warps=8, stages=2))
_GEMM_32 = (
    Tile(16, 32, 32, group=1, warps=4, stages=2),
    Tile(32, 32, 32, group=4, warps=4, stages=2),
    Tile(64, 32, 32, group=8, warps=4, stages=2),
)

_ROUTER = (Tile(1, warps=1), Tile(4, warps=4), Tile(16, warps=8))
_DISPATCH = tuple(Tile(rows, 1024, warps=4) for rows in (16, 32, 64, 128))
_COMBINE = (Tile(1, 512, warps=4), Tile(4, 256, warps=4))

TILES: Mapping[str, Mapping[str, tuple[Tile, ...]]] = {
    "router": dict.fromkeys(("float32", "float16", "bfloat16"), _ROUTER),
    "dispatch": dict.fromkeys(("float32", "float16", "bfloat16"), _DISPATCH),
    "gate_up": {"float32": _GEMM_32, "float16": _GEMM_16, "bfloat16": _GEMM_16},
    "down": {"float32": _GEMM_32, "float16": _DOWN_16, "bfloat16": _DOWN_16},
    "combine": dict.fromkeys(("float32", "float16", "bfloat16"), _COMBINE),
}
"""By kernel and dtype of the activations and weights, from few rows to many."""


def tiles(kernel: str, dtype: str) -> tuple[Tile, ...]:
    """The tile configurations of a kernel for a dtype, from few rows to many.

    Raises:
        UsageError: no such kernel or dtype.
    """
    if kernel not in TILES:
        raise UsageError(f"no GPU kernel {kernel!r}; {choices_text(kernel, TILES)}")
    if dtype not in TILES[kernel]:
        raise UsageError(f"{kernel}: no dtype {dtype!r}; {choices_text(dtype, TILES[kernel])}")
    return TILES[kernel][dtype]
