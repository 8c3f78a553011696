"""Sizes of buckets, and runs that are done again."""

from __future__ import annotations

import pytest

from moe_export.costs.buckets import first_guess, round_up, uniform_load
from moe_export.errors import InputError
from moe_export.runtime.capacity import CapacityRunner, bucket_io, count_tokens, own_io
from moe_export.schema import ModelIO, MoELayer, TensorSpec

IO = ModelIO(
    (
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
        TensorSpec("attention_mask", "int64", ("batch", "total"), "mask"),
        TensorSpec("past.0.key", "float32", ("batch", 2, "past", 4), "cache", "present.0.key"),
        TensorSpec("moe_capacity", "int32", ("capacity",), "capacity"),
    ),
    (
        TensorSpec("logits", "float32", ("batch", "sequence", 9), "logits"),
        TensorSpec("present.0.key", "float32", ("batch", 2, "total", 4), "cache", "past.0.key"),
        TensorSpec("moe_max_load", "int32", (2,), "load"),
    ),
)


def layer(experts: int = 8, top_k: int = 2) -> MoELayer:
    names = ("hidden", "expert_ids", "weights", "output")
    return MoELayer(0, "layer", experts, top_k, 4, 4, *(f"moe.0.{n}" for n in names))


class Engine:
    """Whose fullest expert gets ``load`` tokens; remembers the capacities it was given."""

    def __init__(self, *loads: int) -> None:
        self.loads = list(loads)
        self.seen: list[int] = []

    def __call__(self, capacity: int) -> tuple[str, int]:
        self.seen.append(capacity)
        load = self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]
        return ("void" if load > capacity else "right"), load


def test_a_large_enough_first_guess_runs_once() -> None:
    runner, engine = CapacityRunner([layer()]), Engine(20)
    assert runner.run(64, engine) == "right"
    assert len(engine.seen) == 1 and engine.seen[0] >= 20
    assert (runner.use.runs, runner.use.reruns, runner.use.largest_load) == (1, 0, 20)
    assert "0 re-runs" in runner.use.text()


def test_a_small_bucket_runs_again_until_every_token_fits() -> None:
    """Loads behind an overflow were void: they may grow in the second run."""
    runner, engine = CapacityRunner([layer(64, 1)]), Engine(150, 190, 190)
    assert runner.run(200, engine) == "right"
    assert engine.seen[0] < 150 and engine.seen[-1] >= 190 and len(engine.seen) == 3
    assert (runner.use.runs, runner.use.reruns) == (1, 2)
    assert "2 re-runs" in runner.use.text() and "190 tokens" in runner.use.text()


def test_the_next_guess_has_learned() -> None:
    runner = CapacityRunner([layer(64, 1)])
    runner.run(200, Engine(190))
    again = Engine(95)
    assert runner.run(100, again) == "right" and len(again.seen) == 1


def test_a_result_that_is_void_is_never_returned() -> None:
    for load in range(1, 65):
        assert CapacityRunner([layer(64, 2)]).run(64, Engine(load)) == "right"


def test_an_engine_with_a_largest_bucket_refuses_what_does_not_fit() -> None:
    runner = CapacityRunner([layer(64, 1)], largest=32)
    assert runner.run(200, Engine(32)) == "right"
    with pytest.raises(InputError, match=r"33 tokens chose one expert.*holds 32.*at most 32 tokens"):
        runner.run(200, Engine(33))


def test_the_host_s_own_inputs_are_not_the_model_s() -> None:
    own = own_io(IO)
    assert [s.name for s in own.inputs] == ["input_ids", "attention_mask", "past.0.key"]
    assert [s.name for s in own.outputs] == ["logits", "present.0.key"]
    found = bucket_io(IO)
    assert found is not None and (found.capacity.name, found.load.name) == ("moe_capacity", "moe_max_load")
    assert bucket_io(own) is None
    assert (
        count_tokens(IO, {"input_ids": (3, 7), "attention_mask": (3, 90), "past.0.key": (3, 2, 83, 4)}) == 21
    )
    image = ModelIO((TensorSpec("x", "float32", ("a", "b", 16)),), ())
    assert count_tokens(image, {"x": (5, 3, 16)}) == 15


def test_guesses_hold_what_uniform_choice_gives_and_never_more_than_all() -> None:
    for tokens in (0, 1, 5, 64, 4096):
        for experts, top_k in ((8, 2), (64, 8), (256, 8), (4, 4)):
            guess = first_guess(tokens, top_k, experts)
            assert 1 <= guess <= max(tokens, 1)
            assert guess >= min(tokens, tokens * top_k / experts)
    assert uniform_load(1, 2, 8) == 1.0
    assert round_up(17, 100) == 32 and round_up(17, 20) == 20 and round_up(0, 0) == 1
