"""Kernels with one fault each, for tests that the checks find it."""

from __future__ import annotations

import triton
import triton.language as tl
from moe_export_plugins.gpu.kernels.combine import combine


@triton.jit
def writes_outside(
    rows: tl.tensor, expert_ids: tl.tensor, T: tl.tensor, out: tl.tensor, H: tl.constexpr
) -> None:
    column = tl.arange(0, 32)
    tl.store(out + T * H + column, tl.load(rows + column % H))


@triton.jit
def fails(rows: tl.tensor, expert_ids: tl.tensor, T: tl.tensor, out: tl.tensor) -> None:
    tl.store(out, tl.no_such_thing(rows))


@triton.jit
def other_order(
    expert_ids: tl.tensor,
    rows: tl.tensor,
    T: tl.tensor,
    out: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Two pointers exchanged."""
    combine(rows, expert_ids, T, out, E, K, H, ROWS, COLUMNS)


@triton.jit
def adds_in_any_order(
    rows: tl.tensor, expert_ids: tl.tensor, T: tl.tensor, out: tl.tensor, H: tl.constexpr
) -> None:
    column = tl.arange(0, 64)
    value = tl.load(rows + tl.program_id(0) * H + column) * (tl.load(expert_ids) < T)
    tl.atomic_add(out + column, value)


@triton.jit
def scalar_lost(rows: tl.tensor, expert_ids: tl.tensor, out: tl.tensor, H: tl.constexpr) -> None:
    column = tl.arange(0, 32)
    tl.store(out + column, tl.load(rows + column) + tl.load(expert_ids + column), mask=column < H)


@triton.jit
def without_tensor_cores(inner, down, weights, sorted_rows, block_expert, M, rows):
    """A "product" by element."""
    at = tl.arange(0, 128)
    value = tl.load(inner + at).to(tl.float32) * tl.load(down + at).to(tl.float32) * tl.load(weights + at)
    kept = tl.load(sorted_rows + at) + tl.load(block_expert + at) < M
    tl.store(rows + at, value.to(rows.dtype.element_ty), mask=kept)


@triton.jit
def _product(
    inner, down, weights, sorted_rows, block_expert, M, rows, H: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, 128)[None, :]
    total = tl.zeros([ROWS, 128], tl.float32)
    for step in tl.range(0, M, num_stages=STAGES):
        a = tl.load(inner + i * H + tl.arange(0, DEPTH)[None, :] + step * DEPTH)
        b = tl.load(down + tl.arange(0, DEPTH)[:, None] + j * H + step * DEPTH)
        total = tl.dot(a, b, total)
    total += tl.load(weights) + tl.load(sorted_rows) + tl.load(block_expert)
    tl.store(rows + i * H + j, total.to(rows.dtype.element_ty))


@triton.jit
def spills(inner, down, weights, sorted_rows, block_expert, M, rows, H: tl.constexpr):
    """A tile far too large for the registers of one warp."""
    _product(inner, down, weights, sorted_rows, block_expert, M, rows, H, 64, 16, 1)


@triton.jit
def much_shared_memory(inner, down, weights, sorted_rows, block_expert, M, rows, H: tl.constexpr):
    """Many stages of a pipeline."""
    _product(inner, down, weights, sorted_rows, block_expert, M, rows, H, 128, 64, 6)
