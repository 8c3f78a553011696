"""dispatch: assignments sorted by expert, stably, each expert's rows padded to whole blocks.

One program per expert. Each counts all ids, so that it knows where its blocks begin without waiting for
another program, and then places its own rows: no order between programs, no atomics on global memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dispatch(
    expert_ids: tl.tensor,
    M: tl.tensor,
    NB: tl.tensor,
    sorted_rows: tl.tensor,
    block_expert: tl.tensor,
    counts: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    own = tl.program_id(0)
    expert = tl.arange(0, E_PAD)
    lane = tl.arange(0, COLUMNS)
    histogram = tl.zeros([E_PAD], tl.int32)
    for start in tl.range(0, M, COLUMNS):
        ids = tl.load(expert_ids + start + lane, mask=start + lane < M, other=-1)
        ours = (ids >= 0) & (ids < E)
        histogram += tl.histogram(tl.where(ours, ids, 0), E_PAD, mask=ours)
    blocks = (histogram + (ROWS - 1)) // ROWS
    first = tl.sum(tl.where(expert < own, blocks, 0))
    mine = tl.sum(tl.where(expert == own, blocks, 0))
    count = tl.sum(tl.where(expert == own, histogram, 0))
    used = tl.sum(blocks)

    begin = sorted_rows + first * ROWS
    placed = 0
    for start in tl.range(0, M, COLUMNS):
        ids = tl.load(expert_ids + start + lane, mask=start + lane < M, other=-1)
        hit = (ids == own).to(tl.int32)
        rank = placed + tl.cumsum(hit, axis=0) - 1
        tl.store(begin + rank, start + lane, mask=hit != 0)
        placed += tl.sum(hit)
    padding = count + tl.arange(0, ROWS)
    tl.store(begin + padding, tl.zeros([ROWS], tl.int32) + M, mask=padding < mine * ROWS)
    for block in tl.range(0, mine, COLUMNS):
        tl.store(block_expert + first + block + lane, tl.zeros([COLUMNS], tl.int32) + own,
                 mask=block + lane < mine)  # fmt: skip
    tl.store(counts + own, count)
    if own == E - 1:
        tl.store(counts + E, used)
        for block in tl.range(used, NB, COLUMNS):
            tl.store(block_expert + block + lane, tl.full([COLUMNS], -1, tl.int32), mask=block + lane < NB)
        for row in tl.range(used * ROWS, NB * ROWS, COLUMNS):
            tl.store(sorted_rows + row + lane, tl.zeros([COLUMNS], tl.int32) + M,
                     mask=row + lane < NB * ROWS)  # fmt: skip
