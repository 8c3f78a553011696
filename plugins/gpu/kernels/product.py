"""The product both GEMM kernels are made of: rows anywhere in memory times one expert's matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_and_tile(OUT: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """Which block of rows and which tile of columns this program computes.

    GROUP blocks go through all columns together: programs that run at the same time share weights (blocks of
    one expert lie side by side) and rows.
    """
    tiles: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    blocks = tl.num_programs(0) // tiles
    group = program // (GROUP * tiles)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inside = program - group * (GROUP * tiles)
    return group * GROUP + inside % size, inside // size


@triton.jit
def grouped_product(
    rows: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    columns_real: tl.tensor,
    depth_stride: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
) -> tl.tensor:
    """``rows @ first`` and, if TWO, ``rows @ second``, accumulated in float32: each [ROWS, WIDTH].

    ``rows`` [ROWS, 1], ``first`` and ``second`` [1, WIDTH]: pointers to element 0 of each vector of DEPTH
    numbers; those of rows lie side by side, those of the matrices ``depth_stride`` apart.
    """
    depth = tl.arange(0, STEP)
    sum_1 = tl.zeros([ROWS, WIDTH], tl.float32)
    sum_2 = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(0, DEPTH, STEP):
        k = start + depth
        if DEPTH % STEP == 0:
            a = tl.load(rows + k[None, :])
            if EVEN_COLUMNS:
                b = tl.load(first + k[:, None] * depth_stride)
            else:
                b = tl.load(first + k[:, None] * depth_stride, mask=columns_real, other=0.0)
        else:
            real = k < DEPTH
            a = tl.load(rows + k[None, :], mask=real[None, :], other=0.0)
            b = tl.load(first + k[:, None] * depth_stride, mask=real[:, None] & columns_real, other=0.0)
        sum_1 = tl.dot(a, b, sum_1, input_precision=PRECISION)
        if TWO:
            if DEPTH % STEP == 0:
                if EVEN_COLUMNS:
                    b = tl.load(second + k[:, None] * depth_stride)
                else:
                    b = tl.load(second + k[:, None] * depth_stride, mask=columns_real, other=0.0)
            else:
                real = k < DEPTH
                b = tl.load(second + k[:, None] * depth_stride, mask=real[:, None] & columns_real, other=0.0)
            sum_2 = tl.dot(a, b, sum_2, input_precision=PRECISION)
    return sum_1, sum_2
