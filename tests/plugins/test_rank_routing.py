"""ExpertSlots, RankLoad, RankDispatch and RankCombine: kernels against references, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_export.backends.onnxruntime.runner import ort_error_types
from moe_export.ops import OPS
from moe_export.ops.contract import FLOAT_TYPES
from tests.ops.cases import randoms, rank_dispatch_inputs, rank_slots, slot_tables
from tests.ops.one_op import assert_equal, expected, in_onnxruntime

from .kernels import in_kernel, refusal, session
from .test_errors import F32, I32, I64, node_model

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check(name: str, dtype: str, inputs: dict[str, Any], attributes: dict[str, Any]) -> list[Any]:
    """The kernel gives what the reference gives, and the dtypes and shapes of the body."""
    got = in_kernel(name, inputs, attributes)
    assert_equal(name, dtype, got, expected(name, inputs, attributes))
    body = in_onnxruntime(name, inputs, attributes)
    assert [(a.dtype, a.shape) for a in got] == [(a.dtype, a.shape) for a in body]
    return got


def test_expert_slots() -> None:
    for inputs in slot_tables():
        check("ExpertSlots", "int32", inputs, {})


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_load_dispatch_and_combine(dtype: str) -> None:
    for slots, ranks, per_rank in rank_slots():
        attributes = {"ranks": ranks, "slots_per_rank": per_rank}
        (load,) = check("RankLoad", "int64", {"slots": slots}, attributes)
        for capacity in {1, int(load[0]), len(slots) + 3}:
            inputs = rank_dispatch_inputs(slots, capacity, dtype)
            _, _, places = check("RankDispatch", dtype, inputs, attributes)
            back = {"rows": randoms(dtype, ranks * capacity, 6), "places": places}
            check("RankCombine", dtype, back, {})


@st.composite
def routings(draw: st.DrawFn) -> tuple[Any, int, int, np.random.Generator]:
    tokens, top_k = draw(st.integers(0, 60)), draw(st.integers(1, 8))
    ranks, per_rank = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lowest = draw(st.sampled_from([-1, 0]))
    return rng.integers(lowest, ranks * per_rank, (tokens, top_k)).astype(np.int32), ranks, per_rank, rng


@SETTINGS
@given(routings(), st.sampled_from(FLOAT_TYPES), st.integers(1, 70), st.integers(1, 70))
def test_any_routing(case: Any, dtype: str, hidden: int, capacity: int) -> None:
    slots, ranks, per_rank, rng = case
    attributes = {"ranks": ranks, "slots_per_rank": per_rank}
    (load,) = in_kernel("RankLoad", {"slots": slots}, attributes)
    assert_equal("RankLoad", "int64", [load], expected("RankLoad", {"slots": slots}, attributes))
    inputs = {
        **rank_dispatch_inputs(slots, capacity, dtype),
        "hidden": randoms(dtype, len(slots), hidden, seed=capacity),
    }
    got = in_kernel("RankDispatch", inputs, attributes)
    assert_equal("RankDispatch", dtype, got, expected("RankDispatch", inputs, attributes))
    places = got[2]
    # Each row belongs to one token; without a lack of room each rank of a token has its row.
    rows = places[places >= 0]
    assert len(np.unique(rows)) == len(rows)
    if capacity >= load[0]:
        on = [len({s // per_rank for s in token if s >= 0}) for token in slots.tolist()]
        assert (places >= 0).sum(axis=1).tolist() == on
    back = {"rows": randoms(dtype, ranks * capacity, hidden), "places": places}
    assert_equal("RankCombine", dtype, in_kernel("RankCombine", back, {}), expected("RankCombine", back, {}))


def test_many_threads_give_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    slots = rng.integers(-1, 32, (500, 4)).astype(np.int32)
    attributes = {"ranks": 4, "slots_per_rank": 8}
    inputs = {**rank_dispatch_inputs(slots, 480, "float32"), "hidden": randoms("float32", 500, 256)}
    one, four = (in_kernel("RankDispatch", inputs, attributes, threads) for threads in (1, 4))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, four, strict=True))
    back = {"rows": randoms("float32", 4 * 480, 256), "places": one[2]}
    one, four = (in_kernel("RankCombine", back, {}, threads) for threads in (1, 4))
    assert one[0].tobytes() == four[0].tobytes()


SLOTS = np.array([[0, 3], [-1, 2]], np.int32)
SIZES = {"ranks": 2, "slots_per_rank": 2}
GOOD = rank_dispatch_inputs(SLOTS, 2, "float32")
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "ExpertSlots",
        {"expert_ids": np.array([[0, 4]], np.int32), "table": np.zeros((4, 1), np.int32)},
        {},
        "expert_ids[0, 1] is 4; the table has 4 experts",
    ),
    (
        "ExpertSlots",
        {"expert_ids": SLOTS, "table": np.zeros((4, 0), np.int32)},
        {},
        "table has no columns",
    ),
    ("RankLoad", {"slots": SLOTS + 1}, SIZES, "slots[0, 1] is 4; expected -1 to 3"),
    ("RankLoad", {"slots": SLOTS - 1}, SIZES, "slots[1, 0] is -2; expected -1 to 3"),
    ("RankDispatch", {**GOOD, "slots": SLOTS + 1}, SIZES, "slots[0, 1] is 4; expected -1 to 3"),
    (
        "RankDispatch",
        {**GOOD, "hidden": np.zeros((3, 6), np.float32)},
        SIZES,
        "input hidden has shape [3, 6]; expected 2 (tokens, from slots)",
    ),
    (
        "RankDispatch",
        {**GOOD, "weights": np.zeros((2, 3), np.float32)},
        SIZES,
        "input weights has shape [2, 3]; expected 2 (experts per token, from slots)",
    ),
    ("RankDispatch", {**GOOD, "capacity": np.array([0])}, SIZES, "capacity is 0; expected 1 to 2147483647"),
    (
        "RankDispatch",
        {**GOOD, "capacity": np.array([1, 2])},
        SIZES,
        "input capacity has shape [2]; expected a single number",
    ),
    (
        "RankCombine",
        {"rows": np.zeros((2, 3), np.float32), "places": np.array([[0, 2]])},
        {},
        "places[0, 1] is 2; expected -1 to 1",
    ),
    (
        "RankCombine",
        {"rows": np.zeros((2, 3), np.float32), "places": np.array([[-2, 0]])},
        {},
        "places[0, 0] is -2; expected -1 to 1",
    ),
]


@pytest.mark.parametrize(("op", "inputs", "attributes", "message"), REFUSED, ids=[c[3][:40] for c in REFUSED])
def test_wrong_inputs(op: str, inputs: dict[str, Any], attributes: dict[str, Any], message: str) -> None:
    said = refusal(op, inputs, attributes)
    assert f"moe_export.{op}: " in said and message in said


@pytest.mark.parametrize(
    ("op", "dtypes", "attributes", "message"),
    [
        ("RankLoad", {"slots": I32}, {"ranks": 2}, "attribute slots_per_rank is 0; expected at least 1"),
        ("RankLoad", {"slots": I32}, {"slots_per_rank": 2}, "attribute ranks is 0; expected at least 1"),
        ("RankLoad", {"slots": I32}, {"ranks": 2**40, "slots_per_rank": 2**40}, "at most 2147483647 slots"),
        ("AllReduce", {"x": F32}, {}, "attribute ranks is 0; expected at least 1"),
        ("AllReduce", {"x": F32}, {"ranks": 2, "reduce": "mean"}, "attribute reduce is 'mean'; expected one"),
        ("AllReduce", {"x": I32}, {"ranks": 2}, "tensor(int32)"),
        ("AllToAll", {"x": F32}, {"ranks": -1}, "attribute ranks is -1; expected at least 1"),
        ("AllToAll", {"x": I64}, {"ranks": 2}, "tensor(int64)"),
    ],
)
def test_wrong_nodes(op: str, dtypes: dict[str, int], attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ort_error_types()) as caught:
        session(node_model(op, dtypes, attributes))
    assert message in str(caught.value)


def test_checks_find_a_broken_result() -> None:
    want = expected("RankDispatch", GOOD, SIZES)
    for index in range(3):
        broken = [np.array(a) for a in want]
        broken[index] = broken[index][::-1]
        with pytest.raises(AssertionError, match=OPS["RankDispatch"].outputs[index].name):
            assert_equal("RankDispatch", "float32", broken, want)
