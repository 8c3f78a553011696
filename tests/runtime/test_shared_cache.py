"""Engines that update the cache in place: buffers that grow, and batches that go row by row after a past."""

from __future__ import annotations

import numpy as np
import pytest

from moe_export.runtime.cache import SharedCache
from moe_export.runtime.engine import split_rows
from moe_export.runtime.tensors import to_numpy
from moe_export.schema import TensorSpec

SPEC = TensorSpec("past.0.key", "float32", ("batch", 2, "past", 4), "cache", "present.0.key")


class Binding:
    """Records what is bound: the real binding has no way to ask."""

    def __init__(self) -> None:
        self.inputs: dict[str, object] = {}
        self.outputs: dict[str, object] = {}

    def bind_ortvalue_input(self, name: str, value: object) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: object) -> None:
        self.outputs[name] = value


def test_input_and_output_are_one_buffer_and_growing_keeps_what_is_there() -> None:
    cache = SharedCache((SPEC,), batch=3, room=4)
    binding = Binding()
    cache.bind(binding)  # type: ignore[arg-type]
    first = binding.inputs["past.0.key"]
    assert first is binding.outputs["present.0.key"]
    held = to_numpy(first)  # type: ignore[arg-type]
    held[:, :, :4] = np.arange(3 * 2 * 4 * 4).reshape(3, 2, 4, 4)
    before = held.copy()
    cache.reserve(4)
    cache.bind(binding)  # type: ignore[arg-type]
    assert binding.inputs["past.0.key"] is first, "no growth while there is room"
    cache.reserve(5)
    cache.bind(binding)  # type: ignore[arg-type]
    grown = to_numpy(binding.inputs["past.0.key"])  # type: ignore[arg-type]
    assert grown.shape == (3, 2, 8, 4)
    np.testing.assert_array_equal(grown[:, :, :4], before)
    assert not grown[:, :, 4:].any()


def test_rows_are_split_only_for_several_new_tokens_of_a_batch_after_a_past() -> None:
    def feeds(batch: int, new: int, past: int) -> dict[str, np.ndarray]:
        return {
            "input_ids": np.arange(batch * new).reshape(batch, new),
            "attention_mask": np.ones((batch, past + new), np.int64),
            "past.0.key": np.arange(batch * 2 * past * 4, dtype=np.float32).reshape(batch, 2, past, 4),
            "moe.0.expert_ids": np.arange(batch * new * 2).reshape(batch * new, 2),
        }

    assert split_rows(feeds(1, 3, 5)) is None
    assert split_rows(feeds(2, 1, 5)) is None
    assert split_rows(feeds(2, 3, 0)) is None
    whole = feeds(3, 2, 5)
    rows = split_rows(whole)
    assert rows is not None and len(rows) == 3
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), array)
    assert rows[1]["moe.0.expert_ids"].shape == (2, 2)


@pytest.mark.parametrize("room", [1, 64])
def test_states_cannot_be_shared(room: int) -> None:
    state = TensorSpec("past.0.conv", "float32", ("batch", 8, 3), "cache", "present.0.conv")
    with pytest.raises(ValueError):
        SharedCache((state,), batch=1, room=room)
