"""ExpertSlots, RankLoad, RankDispatch and RankCombine: bodies against references, and what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_export.errors import UsageError
from moe_export.ops import OPS
from moe_export.ops.contract import FLOAT_TYPES

from .cases import randoms, rank_dispatch_inputs, rank_slots, slot_tables
from .one_op import (
    NUMPY,
    OPSETS,
    assert_equal,
    expected,
    in_onnx_reference,
    in_onnxruntime,
    problem,
)

BOTH = pytest.mark.parametrize("run", [in_onnxruntime, in_onnx_reference])
EACH_OPSET = pytest.mark.parametrize("opset", OPSETS)


def capacities(slots: Any, ranks: int, per_rank: int) -> list[int]:
    """Too little room where a block needs more than one row, just enough, and more than there are tokens."""
    (load,) = OPS["RankLoad"].reference(slots, ranks, per_rank).tolist()
    return sorted({1, load, len(slots) + 3})


@BOTH
@EACH_OPSET
def test_expert_slots(run: Any, opset: int) -> None:
    for inputs in slot_tables():
        got = run("ExpertSlots", inputs, {}, opset)
        assert_equal("ExpertSlots", "int32", got, expected("ExpertSlots", inputs, {}))
        assert got[0].dtype == np.int32


@BOTH
def test_the_tokens_index_chooses_the_replica(run: Any) -> None:
    inputs = {
        "expert_ids": np.array([[0], [0], [1], [0], [-1]], np.int32),
        "table": np.array([[4, 7], [2, 2]], np.int32),
    }
    (slots,) = run("ExpertSlots", inputs, {})
    assert slots.tolist() == [[4], [7], [2], [7], [-1]]


@BOTH
@EACH_OPSET
def test_rank_load(run: Any, opset: int) -> None:
    for slots, ranks, per_rank in rank_slots():
        attributes = {"ranks": ranks, "slots_per_rank": per_rank}
        got = run("RankLoad", {"slots": slots}, attributes, opset)
        assert_equal("RankLoad", "int64", got, expected("RankLoad", {"slots": slots}, attributes))
        assert got[0].dtype == np.int64


@BOTH
@EACH_OPSET
def test_rank_dispatch_and_combine(run: Any, opset: int) -> None:
    for slots, ranks, per_rank in rank_slots():
        attributes = {"ranks": ranks, "slots_per_rank": per_rank}
        for dtype in FLOAT_TYPES if opset == 20 else ("float32",):
            for capacity in capacities(slots, ranks, per_rank):
                inputs = rank_dispatch_inputs(slots, capacity, dtype)
                got, want = (
                    run("RankDispatch", inputs, attributes, opset),
                    expected("RankDispatch", inputs, attributes),
                )
                assert_equal("RankDispatch", dtype, got, want)
                out = NUMPY["float32" if dtype == "bfloat16" else dtype]
                assert [a.dtype for a in got] == [out, NUMPY["float32"], NUMPY["int64"]]
                back = {"rows": randoms(dtype, ranks * capacity, 6), "places": want[2]}
                got = run("RankCombine", back, {}, opset)
                assert_equal("RankCombine", dtype, got, expected("RankCombine", back, {}))


@BOTH
def test_a_small_case_by_hand(run: Any) -> None:
    # Two ranks of two slots. Token 0: slots 3 and 2, both on rank 1. Token 1: slots 0 and 3. Token 2: slot 1.
    inputs = {
        "hidden": np.array([[10, 11], [20, 21], [30, 31]], np.float32),
        "slots": np.array([[3, 2], [0, 3], [-1, 1]], np.int32),
        "weights": np.array([[0.25, 0.75], [0.5, 0.125], [9, 1]], np.float32),
        "capacity": np.array([3], np.int64),
    }
    rows, route, places = run("RankDispatch", inputs, {"ranks": 2, "slots_per_rank": 2})
    assert rows.tolist() == [[20, 21], [30, 31], [0, 0], [10, 11], [20, 21], [0, 0]]
    assert route.tolist() == [
        [0, -1, 0.5, 0],
        [-1, 1, 0, 1],
        [-1, -1, 0, 0],
        [1, 0, 0.25, 0.75],
        [-1, 1, 0, 0.125],
        [-1, -1, 0, 0],
    ]
    assert places.tolist() == [[3, -1], [0, 4], [1, -1]]
    (load,) = run("RankLoad", {"slots": inputs["slots"]}, {"ranks": 2, "slots_per_rank": 2})
    assert load.tolist() == [2]
    short = {**inputs, "capacity": np.array([1], np.int64)}
    rows, _, places = run("RankDispatch", short, {"ranks": 2, "slots_per_rank": 2})
    assert rows.tolist() == [[20, 21], [10, 11]]
    assert places.tolist() == [[1, -1], [0, -1], [-1, -1]]


def test_with_room_every_choice_arrives_once() -> None:
    """Dispatched, weighted by the routes and combined: the sum over the choices that lie somewhere."""
    for slots, ranks, per_rank in rank_slots():
        attributes = {"ranks": ranks, "slots_per_rank": per_rank}
        capacity = capacities(slots, ranks, per_rank)[-1]
        inputs = rank_dispatch_inputs(slots, capacity, "float32")
        rows, route, places = expected("RankDispatch", inputs, attributes)
        top_k = slots.shape[1]
        assert (route[:, :top_k] >= 0).sum() == (slots >= 0).sum()
        block = np.repeat(np.arange(ranks), capacity)[:, None]
        value = np.where(route[:, :top_k] >= 0, 1 + block * per_rank + route[:, :top_k], 0)
        weight = (value * route[:, top_k:]).sum(axis=1, keepdims=True)
        (got,) = expected("RankCombine", {"rows": rows * weight, "places": places}, {})
        scale = np.where(slots >= 0, (1 + slots) * inputs["weights"].astype(np.float64), 0).sum(axis=1)
        np.testing.assert_allclose(got, inputs["hidden"] * scale[:, None], rtol=1e-12, atol=1e-12)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(UsageError, match="expert id 4; the table has 4 experts"):
        OPS["ExpertSlots"].reference(np.array([[4]]), np.zeros((4, 1), np.int32))
    for slot in (6, -2):
        with pytest.raises(UsageError, match=f"slot {slot}; expected -1 to 5"):
            OPS["RankLoad"].reference(np.array([[slot]]), 2, 3)
    inputs = rank_dispatch_inputs(np.zeros((2, 1), np.int32), 0, "float32")
    with pytest.raises(UsageError, match="capacity 0; expected at least 1"):
        OPS["RankDispatch"].reference(**inputs, ranks=2, slots_per_rank=1)


def test_comparisons_find_broken_results() -> None:
    slots, ranks, per_rank = next(case for case in rank_slots() if len(case[0]) == 7)
    attributes = {"ranks": ranks, "slots_per_rank": per_rank}
    inputs = rank_dispatch_inputs(slots, 4, "float32")
    rows, route, places = expected("RankDispatch", inputs, attributes)
    op = OPS["RankDispatch"]
    assert problem(op, "float32", rows.astype(np.float32), rows) == ""
    for broken, want in ((np.roll(rows, 1, 0), rows), (route * 2, route), (places[::-1], places)):
        assert problem(op, "float32", broken, want)
