"""Every comparison is fed broken results and must reject them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_export.verify.compare import compare_arrays, row_errors
from moe_export.verify.logits import compare_logits, kl_divergence, log_softmax
from moe_export.verify.tolerance import default_tolerances

RANDOM = np.random.default_rng(0)
REFERENCE = RANDOM.standard_normal((3, 5, 16)).astype(np.float32)

BROKEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "doubled": lambda x: 2 * x,
    "zeroed": np.zeros_like,
    "reversed": lambda x: x[..., ::-1],
    "rows swapped": lambda x: x[:, ::-1],
    "one element": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 77, x + 1e-3, x),
    "one NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 77, np.nan, x),
    "one infinity": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 77, np.inf, x),
    "all NaN": lambda x: np.full_like(x, np.nan),
    "shape": lambda x: x[:, :-1],
    "flattened": lambda x: x.reshape(-1),
}


def _accepted(actual: np.ndarray, limit: float = 1e-5) -> bool:
    error = compare_arrays(actual, REFERENCE)
    if error.problem or error.nonfinite:
        return False
    assert error.max_abs is not None
    return error.max_abs <= limit * max(1.0, error.scale)


def test_accepts_the_same_and_rounding() -> None:
    assert _accepted(REFERENCE)
    assert _accepted(REFERENCE * np.float32(1 + 1e-6))


@pytest.mark.parametrize("name", BROKEN)
def test_rejects_broken(name: str) -> None:
    assert not _accepted(BROKEN[name](REFERENCE))


def test_names_the_worst_element_and_both_values() -> None:
    actual = REFERENCE.copy()
    actual[2, 3, 4] += 0.5
    error = compare_arrays(actual, REFERENCE)
    assert error.worst is not None and error.worst.index == (2, 3, 4)
    assert error.worst.actual == pytest.approx(float(actual[2, 3, 4]))
    assert error.worst.expected == pytest.approx(float(REFERENCE[2, 3, 4]))
    assert "[2, 3, 4]" in error.worst.text()


def test_nan_wins_over_a_large_finite_error_and_is_named() -> None:
    actual = REFERENCE.copy()
    actual[0, 0, 0] += 100
    actual[1, 2, 3] = np.nan
    error = compare_arrays(actual, REFERENCE)
    assert error.nonfinite == 1 and error.worst is not None and error.worst.index == (1, 2, 3)
    assert error.worst.actual is None and "nan" in error.worst.text()


def test_nan_on_both_sides_is_not_agreement() -> None:
    both = REFERENCE.copy()
    both[0, 0, 0] = np.nan
    assert compare_arrays(both, both).nonfinite == 1


def test_equal_infinities_agree_and_opposite_ones_do_not() -> None:
    a = np.array([[-np.inf, 1.0]])
    assert compare_arrays(a, a).nonfinite == 0
    assert compare_arrays(-a, a).nonfinite == 1
    assert compare_arrays(np.array([[-1e30, 1.0]]), a).nonfinite == 1


def test_mask_leaves_positions_out_and_keeps_coordinates() -> None:
    mask = np.ones((3, 5), bool)
    mask[0, :4] = False
    actual = REFERENCE.copy()
    actual[0, :4] = np.nan
    clean = compare_arrays(actual, REFERENCE, mask)
    assert clean.max_abs == 0.0 and clean.nonfinite == 0 and clean.count == 11 * 16
    actual[2, 4, 1] += 1
    error = compare_arrays(actual, REFERENCE, mask)
    assert error.worst is not None and error.worst.index == (2, 4, 1)


def test_mask_of_another_shape_and_text_arrays_are_problems() -> None:
    assert "mask" in compare_arrays(REFERENCE, REFERENCE, np.ones((5, 3), bool)).problem
    assert "not a number" in compare_arrays(np.array(["a"]), np.array(["a"])).problem


def test_empty_is_no_agreement_by_accident() -> None:
    empty = np.zeros((0, 4))
    error = compare_arrays(empty, empty)
    assert error.count == 0 and error.max_abs is None


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
        elements=st.floats(-1e6, 1e6, allow_subnormal=False),
    ),
    st.floats(1e-3, 1e3),
)
def test_metric_properties(x: np.ndarray, scale: float) -> None:
    same = compare_arrays(x, x)
    assert same.max_abs == 0.0 and same.rms == 0.0 and same.cosine == pytest.approx(1.0)
    noise = np.sin(np.arange(x.size)).reshape(x.shape) * scale
    error = compare_arrays(x + noise, x)
    assert error.max_abs is not None and error.rms is not None
    assert error.rms <= error.max_abs * (1 + 1e-9)
    swapped = compare_arrays(x, x + noise)
    assert swapped.max_abs == pytest.approx(error.max_abs) and swapped.rms == pytest.approx(error.rms)
    assert error.max_abs == pytest.approx(float(np.abs((x + noise) - x).max()))


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, (4, 7), elements=st.floats(-50, 50)), st.floats(-20, 20))
def test_kl_is_zero_on_itself_shift_free_and_never_negative(x: np.ndarray, shift: float) -> None:
    p = log_softmax(x)
    assert kl_divergence(p, log_softmax(x + shift)).max() < 1e-9
    assert (kl_divergence(p, log_softmax(x[:, ::-1])) >= 0).all()
    assert np.exp(p).sum(axis=1) == pytest.approx(np.ones(4))


def test_row_errors_do_not_hide_a_small_row_behind_a_huge_one() -> None:
    reference = RANDOM.standard_normal((6, 8))
    reference[0] *= 1e4
    actual = reference.copy()
    actual[3] *= 1.5
    errors = row_errors(actual, reference)
    assert errors[3] == pytest.approx(0.5) and np.delete(errors, 3).max() == 0.0


def test_row_errors_forgive_rounding_in_a_row_that_cancels() -> None:
    reference = RANDOM.standard_normal((6, 8))
    reference[2] *= 1e-9
    actual = reference + 1e-8
    assert row_errors(actual, reference).max() < 1e-5


def test_row_errors_see_a_dropped_row_and_nan() -> None:
    reference = RANDOM.standard_normal((6, 8))
    dropped = reference.copy()
    dropped[5] = 0
    assert row_errors(dropped, reference)[5] == pytest.approx(1.0)
    dropped[4, 0] = np.nan
    assert math.isinf(row_errors(dropped, reference)[4])
    back = row_errors(reference, np.where(np.arange(6)[:, None] == 5, 0.0, reference))
    assert back[5] > 1
    with pytest.raises(ValueError, match="shape"):
        row_errors(reference[:, :4], reference)


def test_logits_metrics() -> None:
    logits = RANDOM.standard_normal((2, 6, 11)) * 3
    ids = RANDOM.integers(0, 11, (2, 6))
    valid = np.ones((2, 6), bool)
    valid[1, 4:] = False
    same = compare_logits(logits, logits, valid, ids)
    assert same.tokens == 10 and same.kl_mean == 0.0 and same.top1 == 1.0 and same.cross_entropy_change == 0.0
    log_p = log_softmax(logits)
    expected = -np.mean(
        [log_p[b, p, ids[b, p + 1]] for b in range(2) for p in range(5) if valid[b, p] and valid[b, p + 1]]
    )
    assert same.cross_entropy_reference == pytest.approx(expected)
    flipped = compare_logits(-logits, logits, valid, ids)
    assert flipped.kl_mean is not None and flipped.kl_mean > 0.5 and flipped.top1 == 0.0
    assert flipped.top1_unexplained == 1.0


def test_logits_outside_the_mask_do_not_count() -> None:
    logits = RANDOM.standard_normal((1, 4, 5))
    other = logits.copy()
    other[0, 0] = np.nan
    valid = np.array([[False, True, True, True]])
    assert compare_logits(other, logits, valid).kl_mean == 0.0
    assert compare_logits(other, logits, np.ones((1, 4), bool)).kl_mean is None


def test_top1_tie_of_the_reference_is_explained() -> None:
    reference = np.array([[[1.0, 1.0 - 1e-7, 0.0]]])
    engine = np.array([[[1.0 - 1e-7, 1.0, 0.0]]])
    error = compare_logits(engine, reference, np.ones((1, 1), bool), tie_bound=1e-5)
    assert error.top1 == 0.0 and error.top1_unexplained == 0.0
    assert compare_logits(engine, reference, np.ones((1, 1), bool), tie_bound=1e-9).top1_unexplained == 1.0


def test_logits_with_masked_vocabulary() -> None:
    reference = np.array([[[1.0, -np.inf, 0.0]]])
    one = np.ones((1, 1), bool)
    assert compare_logits(reference, reference, one).kl_mean == 0.0
    assert compare_logits(np.array([[[-np.inf, 1.0, 0.0]]]), reference, one).kl_mean is None
    with pytest.raises(ValueError, match="fit"):
        compare_logits(reference, reference, np.ones((1, 2), bool))


def test_defaults_have_a_reason_and_grow_with_the_dtype() -> None:
    tables = [default_tolerances(d, ["logits"]).limits for d in ("float32", "float16", "bfloat16")]
    assert tables[0].keys() == tables[1].keys() == tables[2].keys()
    for name in tables[0]:
        values = [t[name].value for t in tables]
        assert values == sorted(values), name
        assert all(t[name].reason and t[name].measures for t in tables)


def test_overrides() -> None:
    from moe_export.errors import UsageError

    table = default_tolerances("float32", ["logits"], {"logits": 1e-3, "moe.routing": 0.01})
    assert table["logits"].value == 1e-3 and "set by the user" in table["logits"].reason
    assert table["logits.rms"].value == default_tolerances("float32", ["logits"])["logits.rms"].value
    with pytest.raises(UsageError, match=r"'logit'.*nearest: logits"):
        default_tolerances("float32", ["logits"], {"logit": 1.0})
    for bad in (float("nan"), -1.0, float("inf"), True, "1"):
        with pytest.raises(UsageError, match="logits"):
            default_tolerances("float32", ["logits"], {"logits": bad})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="float8"):
        default_tolerances("float8", ["logits"])
