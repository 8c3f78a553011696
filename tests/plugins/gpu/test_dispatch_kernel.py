"""The dispatch kernel under Triton's interpreter: a stable sort into whole blocks per expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moe_export_plugins.gpu.contract import CONTRACTS
from moe_export_plugins.gpu.interpret import run_interpreted
from numpy.typing import NDArray

from moe_export.costs.tiles import Tile, tiles
from moe_export.ops import dispatch as dispatch_op


def expected(ids: NDArray[np.int32], experts: int, rows: int) -> dict[str, NDArray[np.int32]]:
    """The three outputs, from the op's reference."""
    order, offsets, _ = dispatch_op.reference(ids, experts)
    m = ids.size
    constants = {"num_experts": experts, "top_k": ids.shape[1]}
    blocks = CONTRACTS["dispatch"].launch(constants, Tile(rows, 64), ids.shape[0]).scalars[1]
    sorted_rows = np.full(blocks * rows, m, np.int32)
    block_expert = np.full(blocks, -1, np.int32)
    counts = np.diff(offsets).astype(np.int32)
    block = 0
    for e in range(experts):
        own = order[offsets[e] : offsets[e + 1]]
        sorted_rows[block * rows : block * rows + len(own)] = own
        used = -(-len(own) // rows)
        block_expert[block : block + used] = e
        block += used
    return {
        "sorted_rows": sorted_rows,
        "block_expert": block_expert,
        "counts": np.append(counts, np.int32(block)),
    }


def check(ids: Any, experts: int, tile: Tile) -> None:
    ids = np.asarray(ids, np.int32)
    constants = {"num_experts": experts, "top_k": ids.shape[1]}
    result = run_interpreted("dispatch", {"expert_ids": ids}, constants, tile)
    for name, wanted in expected(ids, experts, tile.rows).items():
        assert np.array_equal(result[name], wanted), name


@pytest.mark.parametrize("tile", tiles("dispatch", "float32")[:2], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (40, 6, 3), (5, 12, 12), (3, 1, 1)])
def test_random_ids(tokens: int, experts: int, top_k: int, tile: Tile) -> None:
    rng = np.random.default_rng(tokens)
    check(np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k], experts, tile)


def test_more_assignments_than_are_read_at_once() -> None:
    check(np.random.default_rng(0).integers(0, 5, (70, 2)), 5, Tile(16, 64))


def test_no_token() -> None:
    check(np.empty((0, 3), np.int32), 4, Tile(16, 64))


def test_all_tokens_to_one_expert() -> None:
    check(np.full((50, 1), 2), 4, Tile(16, 64))


def test_dropped_and_foreign_experts_are_left_out() -> None:
    ids = np.random.default_rng(1).integers(-1, 9, (30, 3))
    check(ids, 5, Tile(16, 64))
    check(np.full((4, 2), -1), 5, Tile(16, 64))
    check(np.full((4, 2), 7), 5, Tile(16, 64))


@pytest.mark.parametrize("rows", [16, 64])
def test_blocks_always_suffice(rows: int) -> None:
    """NB comes from shapes alone: no distribution of the assignments needs more."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        experts, tokens, top_k = (int(rng.integers(1, n)) for n in (20, 60, 5))
        counts = np.bincount(rng.integers(0, experts, tokens * top_k), minlength=experts)
        needed = int((-(-counts // rows)).sum())
        launch = CONTRACTS["dispatch"].launch(
            {"num_experts": experts, "top_k": top_k}, Tile(rows, 64), tokens
        )
        assert needed <= launch.scalars[1]
