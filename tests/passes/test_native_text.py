"""Native lowerings against ExpertMLP's float64 reference: every form, dropped ids, empty experts."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_export.ops import OPS
from moe_export.passes.native_text import LOWERINGS, uses_buckets
from tests.ops.cases import expert_ids, expert_inputs, routings
from tests.ops.one_op import problem

from .native_models import FORMS, THRESHOLD, form_of, run_native

CASES = [*routings(), (expert_ids(64, 2, 8, strangers=False), 8), (np.zeros((8, 1), np.int32), 3)]


def fullest(ids: NDArray[np.int32], experts: int) -> int:
    return max(int((ids == e).sum()) for e in range(experts))


def expected(name: str, ids: NDArray[np.int32], experts: int, inputs: dict) -> NDArray[np.float64]:
    attributes = OPS["ExpertMLP"].complete({**FORMS[name], "num_experts": experts})
    return np.asarray(OPS["ExpertMLP"].reference(**inputs, **attributes))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_equals_the_reference(name: str, lowering: str) -> None:
    for ids, experts in CASES:
        if lowering == "buckets" and not len(ids):
            continue  # of no token: `both` gathers
        inputs = expert_inputs(FORMS[name], ids, experts, "float32", "float32")
        load = fullest(ids, experts)
        got, told = run_native(form_of(name, ids, experts), lowering, inputs, max(load, 1))
        wrong = problem(OPS["ExpertMLP"], "float32", got, expected(name, ids, experts, inputs))
        assert not wrong, f"{ids.shape}, {experts} experts: {wrong}"
        gathers = lowering == "both" and len(ids) <= THRESHOLD
        if uses_buckets(lowering):
            assert told == (0 if gathers else load)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_float16(lowering: str) -> None:
    for name in FORMS:
        for ids, experts in ((expert_ids(7, 2, 4), 4), (expert_ids(40, 3, 16, strangers=False), 16)):
            inputs = expert_inputs(FORMS[name], ids, experts, "float16", "float16")
            got, _ = run_native(form_of(name, ids, experts, "float16"), lowering, inputs, len(ids))
            wrong = problem(OPS["ExpertMLP"], "float16", got, expected(name, ids, experts, inputs))
            assert got.dtype == np.float16 and not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_matrices_in_another_dtype_than_the_tokens(lowering: str) -> None:
    ids, experts = expert_ids(7, 2, 4), 4
    inputs = expert_inputs(FORMS["gpt-oss"], ids, experts, "float32", "float16")
    got, _ = run_native(form_of("gpt-oss", ids, experts, "float32", "float16"), lowering, inputs, len(ids))
    assert not problem(OPS["ExpertMLP"], "float32", got, expected("gpt-oss", ids, experts, inputs))


def test_a_bucket_that_is_too_small_is_told_and_its_result_is_void() -> None:
    ids, experts = np.asarray([[0, 1], [0, 2], [0, 3], [1, 0]], np.int32), 4
    inputs = expert_inputs(FORMS["swiglu"], ids, experts, "float32", "float32")
    form = form_of("swiglu", ids, experts)
    want = expected("swiglu", ids, experts, inputs)
    small, told = run_native(form, "buckets", inputs, 3)
    assert told == 4 and problem(OPS["ExpertMLP"], "float32", small, want)
    enough, told = run_native(form, "buckets", inputs, 4)
    assert told == 4 and not problem(OPS["ExpertMLP"], "float32", enough, want)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_an_expert_nobody_chose_may_overflow(lowering: str) -> None:
    """Infinite outputs of other experts, or of rows without an owner, reach no token."""
    ids, experts = np.asarray([[0, 1], [1, -1], [0, 9]], np.int32), 4
    inputs = expert_inputs(FORMS["swiglu"], ids, experts, "float32", "float32")
    inputs["up"][2:] = np.float32(1e30)
    inputs["down"][2:] = np.float32(1e30)
    with np.errstate(over="ignore", invalid="ignore"):
        want = expected("swiglu", ids, experts, inputs)
    got, _ = run_native(form_of("swiglu", ids, experts), lowering, inputs, 3)
    assert np.isfinite(want).all()
    assert not problem(OPS["ExpertMLP"], "float32", got, want)


def test_the_comparison_rejects_a_swapped_expert_and_doubled_weights() -> None:
    ids, experts = expert_ids(7, 2, 4, strangers=False), 4
    inputs = expert_inputs(FORMS["swiglu"], ids, experts, "float32", "float32")
    want = expected("swiglu", ids, experts, inputs)
    for change in ({"up": inputs["up"][::-1].copy()}, {"weights": inputs["weights"] * 2}):
        got, _ = run_native(form_of("swiglu", ids, experts), "both", {**inputs, **change}, 7)
        assert problem(OPS["ExpertMLP"], "float32", got, want)
