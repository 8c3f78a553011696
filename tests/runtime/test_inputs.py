"""Every way inputs can be wrong is one clear error; what may be left out is derived."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_export.errors import InputError
from moe_export.runtime.inputs import InputChecker, positions_of
from moe_export.schema import Limits, ModelIO, TensorSpec
from tests.helpers import tiny_model as tiny
from tests.helpers.tiny_bundle import tiny_io

IDS = np.array([[1, 2, 3], [4, 5, 6]])


def _check(inputs: Any, limits: Limits | None = None) -> dict[str, np.ndarray]:
    return InputChecker(tiny_io(), limits or Limits(), tiny.VOCAB).check(inputs).feeds


def _past(length: int, batch: int = 2) -> dict[str, np.ndarray]:
    shape = (batch, tiny.KV_HEADS, length, tiny.HEAD_DIM)
    return {spec.name: np.zeros(shape, np.float32) for spec in tiny_io().cache_inputs}


def test_everything_but_the_ids_is_derived() -> None:
    feeds = _check({"input_ids": IDS})
    assert set(feeds) == {spec.name for spec in tiny_io().inputs}
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((2, 3)))
    np.testing.assert_array_equal(feeds["position_ids"], [[0, 1, 2]] * 2)
    assert feeds["past.1.value"].shape == (2, tiny.KV_HEADS, 0, tiny.HEAD_DIM)
    assert all(feeds[spec.name].dtype.name == spec.dtype for spec in tiny_io().inputs)


def test_positions_skip_padding_and_continue_after_a_past() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(positions_of(mask), [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    feeds = _check({"input_ids": IDS, "attention_mask": mask, **_past(2)})
    np.testing.assert_array_equal(feeds["position_ids"], [[0, 1, 2], [2, 3, 4]])


def test_positions_without_a_mask_count_from_the_past() -> None:
    io = ModelIO(tuple(spec for spec in tiny_io().inputs if spec.role != "mask"), ())
    feeds = InputChecker(io, Limits(), None).check({"input_ids": IDS, **_past(4)}).feeds
    np.testing.assert_array_equal(feeds["position_ids"], [[4, 5, 6]] * 2)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, r"input 'input_ids' \(int64 \[batch, sequence\]\) is missing"),
        ([IDS], "inputs are a list"),
        ({"input_id": IDS}, "unknown input 'input_id'; nearest: input_ids"),
        (
            {"input_ids": IDS, "past.0.key": _past(1)["past.0.key"]},
            "'past.0.value' is missing while others are given",
        ),
        ({"input_ids": IDS[0]}, r"'input_ids' has shape \[3\]; expected \[batch, sequence\]"),
        ({"input_ids": IDS.astype(np.float32)}, "dtype float32; expected int64"),
        ({"input_ids": IDS.astype(np.uint64)}, "dtype uint64; expected int64"),
        ({"input_ids": [["a"]]}, "dtype <U1; expected int64"),
        ({"input_ids": [[1, 2], [3]]}, "'input_ids' is not an array"),
        ({"input_ids": IDS, "attention_mask": np.ones((2, 3))}, "dtype float64; expected int64"),
        (
            {"input_ids": IDS, "attention_mask": np.ones((3, 3), int)},
            r"axis 0 of 'attention_mask' \(batch\) is 3, but axis 0 of 'input_ids' is 2",
        ),
        (
            {"input_ids": IDS, "attention_mask": np.ones((2, 4), int)},
            r"\(total\) is 4; expected past 0 \+ sequence 3 = 3",
        ),
        (
            {"input_ids": IDS, "attention_mask": np.ones((2, 3), int), **_past(2)},
            r"is 3; expected past 2 \+ sequence 3 = 5",
        ),
        (
            {"input_ids": IDS, "position_ids": np.zeros((2, 2), int)},
            r"axis 1 of 'position_ids' \(sequence\) is 2, but axis 1 of 'input_ids' is 3",
        ),
        (
            {"input_ids": IDS, **_past(2), "past.1.key": _past(3)["past.1.key"]},
            r"axis 2 of 'past.1.key' \(past\) is 3, but axis 2 of 'past.0.key' is 2",
        ),
        (
            {"input_ids": IDS, **{k: v[:, :1] for k, v in _past(2).items()}},
            "axis 1 of 'past.0.key' is 1; expected 2",
        ),
        (
            {"input_ids": IDS, **{k: v.astype(np.float64) for k, v in _past(2).items()}},
            "dtype float64; expected float32",
        ),
        ({"input_ids": np.zeros((0, 3), int)}, "batch is 0"),
        ({"input_ids": np.zeros((2, 0), int)}, "sequence is 0"),
        ({"input_ids": []}, r"has shape \[0\]"),
        (
            {"input_ids": [[1, 2], [3, tiny.VOCAB]]},
            rf"input_ids\[1, 1\] is {tiny.VOCAB}; the vocabulary is 0 to {tiny.VOCAB - 1}",
        ),
        ({"input_ids": [[1, -1]]}, r"input_ids\[0, 1\] is -1"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 2]]},
            r"attention_mask\[0, 1\] is 2; expected 0 \(padding\) or 1",
        ),
        ({"input_ids": [[1, 2]], "position_ids": [[0, -1]]}, r"position_ids\[0, 1\] is -1"),
    ],
)
def test_wrong_inputs(inputs: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        _check(inputs)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64])
def test_integers_widen(dtype: Any) -> None:
    feeds = _check({"input_ids": IDS.astype(dtype), "attention_mask": np.ones((2, 3), bool)})
    assert feeds["input_ids"].dtype == feeds["attention_mask"].dtype == np.int64
    np.testing.assert_array_equal(feeds["input_ids"], IDS)


def test_lists_take_the_declared_dtype() -> None:
    io = ModelIO(
        (
            TensorSpec("x", "float32", ("n",)),
            TensorSpec("y", "int32", ("n",)),
            TensorSpec("z", "bfloat16", ("n",)),
            TensorSpec("b", "bool", ("n",)),
        ),
        (),
    )
    checker = InputChecker(io, Limits(), None)
    feeds = checker.check({"x": [1, 2.5], "y": [1, 2], "z": [1.0, 2.5], "b": [True, False]}).feeds
    assert [feeds[n].dtype.name for n in "xyzb"] == ["float32", "int32", "bfloat16", "bool"]
    assert feeds["z"].astype(np.float32).tolist() == [1.0, 2.5]
    with pytest.raises(InputError, match="'y' has dtype int64; expected int32"):
        checker.check({"x": [1.0], "y": [2**40], "z": [1.0], "b": [True]})
    with pytest.raises(InputError, match="'b' has dtype int64; expected bool"):
        checker.check({"x": [1.0], "y": [2], "z": [1.0], "b": [1]})


def test_arrays_are_made_contiguous() -> None:
    feeds = _check({"input_ids": np.asfortranarray(IDS)[:, ::-1]})
    assert feeds["input_ids"].flags.c_contiguous
    np.testing.assert_array_equal(feeds["input_ids"], IDS[:, ::-1])


@pytest.mark.parametrize(
    ("inputs", "limits", "text"),
    [
        (
            {"input_ids": IDS},
            Limits(max_batch=1),
            "batch of 2 is beyond the bundle's maximum 1; rebuild with --max-batch",
        ),
        (
            {"input_ids": IDS},
            Limits(max_sequence=2),
            "sequence of 3 tokens is beyond the bundle's maximum 2; rebuild with --max-seq",
        ),
        (
            {"input_ids": IDS, **_past(200)},
            Limits(max_sequence=202),
            r"sequence of 203 tokens \(past 200 \+ new 3\) is beyond the bundle's maximum 202",
        ),
    ],
)
def test_limits(inputs: Any, limits: Limits, text: str) -> None:
    with pytest.raises(InputError, match=text):
        _check(inputs, limits)


def test_limits_are_inclusive() -> None:
    assert _check({"input_ids": IDS, **_past(4)}, Limits(max_batch=2, max_sequence=7))


def test_both_sequences_of_an_encoder_decoder_are_limited() -> None:
    io = ModelIO(
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
            TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
            TensorSpec("decoder_input_ids", "int64", ("batch", "decoder_sequence"), "token_ids"),
        ),
        (),
    )
    checker = InputChecker(io, Limits(max_sequence=4), 10)
    feeds = checker.check({"input_ids": [[1, 2, 3]], "decoder_input_ids": [[1]]}).feeds
    np.testing.assert_array_equal(feeds["attention_mask"], [[1, 1, 1]])
    with pytest.raises(InputError, match="sequence of 5 tokens"):
        checker.check({"input_ids": [[1, 2, 3]], "decoder_input_ids": [[1] * 5]})
    with pytest.raises(InputError, match=r"decoder_input_ids\[0, 0\] is 10"):
        checker.check({"input_ids": [[1, 2, 3]], "decoder_input_ids": [[10]]})


def test_free_dimensions_of_modules_may_be_zero() -> None:
    io = ModelIO((TensorSpec("x", "float32", ("tokens", 4)), TensorSpec("y", "float32", ("tokens", 2))), ())
    checker = InputChecker(io, Limits(), None)
    assert checker.check({"x": np.zeros((0, 4), np.float32), "y": np.zeros((0, 2), np.float32)}).dims == {
        "tokens": 0
    }
    with pytest.raises(InputError, match="input 'y'"):
        checker.check({"x": np.zeros((1, 4), np.float32)})
