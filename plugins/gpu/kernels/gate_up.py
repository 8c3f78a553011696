"""gate_up: gathered tokens times gate and up of their expert, bias, activation."""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import activation, gate_of
from .product import block_and_tile, grouped_product


@triton.jit
def gate_up(
    hidden: tl.tensor,
    up: tl.tensor,
    up_bias: tl.tensor,
    sorted_rows: tl.tensor,
    block_expert: tl.tensor,
    M: tl.tensor,
    inner: tl.tensor,
    K: tl.constexpr,
    H: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    block, tile = block_and_tile(INNER, COLUMNS, GROUP)
    expert = tl.load(block_expert + block)
    if expert >= 0:
        width: tl.constexpr = 2 * INNER if GATED else INNER
        pairs: tl.constexpr = GATED and INTERLEAVED
        wide: tl.constexpr = 2 * COLUMNS if pairs else COLUMNS
        even: tl.constexpr = INNER % COLUMNS == 0
        assignment = tl.load(sorted_rows + block * ROWS + tl.arange(0, ROWS))
        real = assignment < M
        token = tl.where(real, assignment // K, 0).to(tl.int64)
        column = tile * wide + tl.arange(0, wide)
        columns_real = (column < (width if pairs else INNER))[None, :]
        column_stride: tl.constexpr = 1 if TRANSPOSED else H
        matrix = up + expert.to(tl.int64) * (width * H)
        first = matrix + (column * column_stride)[None, :]
        sum_1, sum_2 = grouped_product(
            hidden + token[:, None] * H,
            first,
            first + INNER * column_stride,
            columns_real,
            width if TRANSPOSED else 1,
            H,
            even,
            GATED and not pairs,
            PRECISION,
            ROWS,
            wide,
            DEPTH,
        )
        if BIASED:
            bias = up_bias + expert.to(tl.int64) * width + column
            sum_1 += tl.load(bias, mask=column < (width if pairs else INNER), other=0.0).to(tl.float32)[
                None, :
            ]
            if GATED and not pairs:
                sum_2 += tl.load(bias + INNER, mask=column < INNER, other=0.0).to(tl.float32)[None, :]
        out_column = tile * COLUMNS + tl.arange(0, COLUMNS)
        if GATED:
            if pairs:
                gate, linear = tl.split(tl.reshape(sum_1, (ROWS, COLUMNS, 2)))
                value = gate_of(gate, linear, ACTIVATION, ALPHA, LIMIT)
            else:
                value = gate_of(sum_1, sum_2, ACTIVATION, ALPHA, LIMIT)
        else:
            value = activation(sum_1, ACTIVATION)
        place = inner + tl.where(real, assignment, 0).to(tl.int64)[:, None] * INNER + out_column[None, :]
        tl.store(place, value.to(inner.dtype.element_ty), mask=real[:, None] & (out_column < INNER)[None, :])
