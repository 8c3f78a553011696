"""down: activations times down of their expert, bias, routing weight."""

from __future__ import annotations

import triton
import triton.language as tl

from .product import block_and_tile, grouped_product


@triton.jit
def down(
    inner: tl.tensor,
    down: tl.tensor,
    down_bias: tl.tensor,
    weights: tl.tensor,
    sorted_rows: tl.tensor,
    block_expert: tl.tensor,
    M: tl.tensor,
    rows: tl.tensor,
    H: tl.constexpr,
    INNER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    block, tile = block_and_tile(H, COLUMNS, GROUP)
    expert = tl.load(block_expert + block)
    if expert >= 0:
        even: tl.constexpr = H % COLUMNS == 0
        assignment = tl.load(sorted_rows + block * ROWS + tl.arange(0, ROWS))
        real = assignment < M
        row = tl.where(real, assignment, 0).to(tl.int64)
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        columns_real = (column < H)[None, :]
        column_stride: tl.constexpr = 1 if TRANSPOSED else INNER
        first = down + expert.to(tl.int64) * (H * INNER) + (column * column_stride)[None, :]
        value, _ = grouped_product(
            inner + row[:, None] * INNER,
            first,
            first,
            columns_real,
            H if TRANSPOSED else 1,
            INNER,
            even,
            False,
            PRECISION,
            ROWS,
            COLUMNS,
            DEPTH,
        )
        if BIASED:
            bias = tl.load(down_bias + expert.to(tl.int64) * H + column, mask=column < H, other=0.0)
            value += bias.to(tl.float32)[None, :]
        value *= tl.load(weights + row, mask=real, other=0.0)[:, None]
        tl.store(
            rows + row[:, None] * H + column[None, :],
            value.to(rows.dtype.element_ty),
            mask=real[:, None] & columns_real,
        )
