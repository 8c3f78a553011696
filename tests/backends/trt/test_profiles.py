"""Profiles: shapes from limits, what they cover, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from moe_export.backends.trt.profiles import (
    DEFAULT_BATCH,
    DEFAULT_SEQUENCE,
    Profile,
    engine_limits,
    make_profiles,
    require_covered,
)
from moe_export.errors import UsageError
from moe_export.schema import Limits, ModelIO, TensorSpec

CACHE = TensorSpec("past.0.key", "float32", ("batch", 2, "past", 8), "cache", "present.0.key")
DECODER = ModelIO(
    (
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
        TensorSpec("attention_mask", "int64", ("batch", "total"), "mask"),
        CACHE,
        TensorSpec("moe_capacity", "int32", ("capacity",), "capacity"),
    ),
    (),
)


def test_one_profile_covers_prefill_and_decode() -> None:
    (profile,) = make_profiles(DECODER, Limits(3, 50), split=False)
    assert profile.name == "all"
    assert profile.shapes["input_ids"] == ((1, 1), (1, 50), (3, 50))
    assert profile.shapes["past.0.key"][0] == (1, 2, 0, 8) and profile.shapes["past.0.key"][2] == (
        3,
        2,
        49,
        8,
    )
    assert profile.shapes["moe_capacity"][2] == (150,), "a bucket for every token always suffices"
    for new, past in ((50, 0), (1, 49), (7, 20)):
        shapes = {"input_ids": (3, new), "attention_mask": (3, new + past), "past.0.key": (3, 2, past, 8)}
        assert profile.covers(shapes) == ""
    assert "input_ids of shape [4, 1] is outside [1, 1] ... [3, 50]" in profile.covers({"input_ids": (4, 1)})
    assert profile.covers({"input_ids": (1, 1, 1)})


def test_split_profiles_have_decode_first() -> None:
    decode, prefill = make_profiles(DECODER, Limits(2, 64), split=True)
    assert (decode.name, prefill.name) == ("decode", "prefill")
    assert {shape[1] for shape in decode.shapes["input_ids"]} == {1}
    assert decode.covers({"input_ids": (2, 1), "past.0.key": (2, 2, 63, 8)}) == ""
    assert decode.covers({"input_ids": (1, 2)})


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_engines_have_profiles(length: int) -> None:
    for split in (False, True):
        make_profiles(DECODER, Limits(1, length), split=split)


def test_dimensions_without_a_limit_have_a_bound_of_their_own() -> None:
    io = ModelIO((TensorSpec("frames", "float32", ("batch", "frames", 4)),), ())
    (profile,) = make_profiles(io, Limits(2, 16), split=True)
    assert profile.shapes["frames"][2] == (2, 1024, 4)


def test_limits_that_were_not_asked_for() -> None:
    assert engine_limits(Limits(None, None), asked=False) == Limits(DEFAULT_BATCH, DEFAULT_SEQUENCE)
    assert engine_limits(Limits(None, 131072), asked=False) == Limits(DEFAULT_BATCH, DEFAULT_SEQUENCE)
    assert engine_limits(Limits(9, 131072), asked=True) == Limits(9, 131072)
    assert engine_limits(Limits(None, 100), asked=False).max_sequence == 100


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": ((4, 1), (2, 1), (8, 1))}, "profile 'p': input 'x', axis 0: min 4, opt 2, max 8; expected"),
        ({"x": ((1, 9), (1, 9), (1, 3))}, "axis 1: min 9, opt 9, max 3"),
        ({"x": ((-1,), (2,), (3,))}, "min -1"),
        ({"x": ((1,), (1, 1), (1,))}, "shapes of 1, 2 and 1 axes"),
    ],
)
def test_bad_profiles_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Profile("p", shapes)
    assert message in str(caught.value)


def test_profiles_that_lack_a_parity_input_are_refused() -> None:
    profiles = make_profiles(DECODER, Limits(2, 16), split=False)
    require_covered(profiles, [("random", {"input_ids": (2, 16)})])
    with pytest.raises(UsageError, match=r"not cover the parity input 'maximum': input_ids .*--max-seq"):
        require_covered(profiles, [("random", {"input_ids": (1, 3)}), ("maximum", {"input_ids": (2, 17)})])
