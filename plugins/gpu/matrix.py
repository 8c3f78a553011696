"""The compile matrix: every kernel for every SM, dtype and tile configuration, at one MoE layer's sizes."""

from __future__ import annotations

from typing import Any

from moe_export.costs.tiles import KERNELS, Tile, tiles

from .checks import problems
from .compile import CompiledKernel, Request
from .contract import CONTRACTS, DTYPES

SMS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
"""Those of the table: the generations, and the last of each. Kernels for the others are checked alike."""
LAYER: dict[str, Any] = {"num_experts": 64, "top_k": 8, "hidden": 2048, "inner": 1024}
"""Sizes that the matrix is compiled at (those of OLMoE's layers). Other sizes change few registers."""


def requests(
    *, every_tile: bool = True, sms: tuple[str, ...] = (), dtypes: tuple[str, ...] = ()
) -> list[Request]:
    """What to compile, in the table's order. ``every_tile`` False: the first and the last tile of the matrix
    products, and one of the others."""
    found = []
    for kernel in KERNELS:
        for dtype in dtypes or DTYPES:
            if kernel == "dispatch" and dtype != (dtypes or DTYPES)[0]:
                continue  # it reads and writes integers only
            for tile in _some(kernel, dtype, every_tile):
                found += [Request(kernel, _constants(kernel), dtype, sm, tile) for sm in sms or SMS]
    return found


def _some(kernel: str, dtype: str, every_tile: bool) -> tuple[Tile, ...]:
    known = tiles(kernel, dtype)
    if every_tile:
        return known
    return (known[0], known[-1]) if CONTRACTS[kernel].is_gemm else known[-1:]


def _constants(kernel: str) -> dict[str, Any]:
    names = {a.name for a in CONTRACTS[kernel].constants}
    return {k: v for k, v in LAYER.items() if k in names}


HEADERS = ("kernel", "dtype", "tile", "SM", "registers", "shared bytes", "spilled", "tensor instructions",
           "occupancy", "problems")  # fmt: skip


def table_row(kernel: CompiledKernel) -> tuple[str, ...]:
    """One line of the table, in the order of :data:`HEADERS`."""
    tensor = ", ".join(f"{count} {name}" for name, count in sorted(kernel.tensor_instructions.items()))
    return (
        kernel.kernel,
        "int32" if kernel.kernel == "dispatch" else kernel.dtype,
        str(kernel.tile),
        kernel.sm,
        str(kernel.registers),
        str(kernel.shared_bytes),
        str(kernel.spill_bytes),
        tensor or "-",
        f"{kernel.occupancy:.0%}",
        "; ".join(problems(kernel)) or "-",
    )
