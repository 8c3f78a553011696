"""combine: each token's K weighted rows, summed in order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(
    rows: tl.tensor,
    expert_ids: tl.tensor,
    T: tl.tensor,
    out: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = (column < H)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(K):
        assignment = token.to(tl.int64) * K + k
        expert = tl.load(expert_ids + assignment, mask=token < T, other=-1)
        ours = ((expert >= 0) & (expert < E))[:, None]
        total += tl.load(rows + assignment[:, None] * H + column[None, :], mask=ours & real, other=0.0).to(
            tl.float32
        )
    tl.store(
        out + token.to(tl.int64)[:, None] * H + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(token < T)[:, None] & real,
    )
