"""The packed layout: its definition element by element, exact round trips, refused shapes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_export.errors import UsageError
from moe_export.ops import packing

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def weights(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("intermediate", [1, 31, 32, 33, 64, 100])
def test_gated_up_has_gate_and_up_of_32_columns_side_by_side(intermediate: int, layout: str) -> None:
    experts, hidden = 2, 5
    up = weights((experts, 2 * intermediate, hidden))
    packed = packing.pack_up(up, layout=layout)
    assert packed.shape == (experts, packing.up_panels(intermediate, True), hidden, 64)
    expected = np.zeros_like(packed)
    for e in range(experts):
        for i in range(intermediate):
            gate, linear = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, intermediate + i)
            expected[e, i // 32, :, i % 32] = up[e, gate]
            expected[e, i // 32, :, 32 + i % 32] = up[e, linear]
    assert bits(packed) == bits(expected)


@pytest.mark.parametrize("hidden", [1, 63, 64, 65, 130])
def test_down_has_panels_of_64_columns(hidden: int) -> None:
    experts, intermediate = 3, 7
    down = weights((experts, hidden, intermediate))
    packed = packing.pack_down(down)
    assert packed.shape == (experts, packing.down_panels(hidden), intermediate, 64)
    expected = np.zeros_like(packed)
    for h in range(hidden):
        expected[:, h // 64, :, h % 64] = down[:, h]
    assert bits(packed) == bits(expected)


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 4),
    hidden=st.integers(1, 150),
    intermediate=st.integers(1, 150),
    gated=st.booleans(),
    transposed=st.booleans(),
    layout=st.sampled_from(["concatenated", "interleaved"]),
    dtype=st.sampled_from(DTYPES),
)
def test_unpacking_gives_the_same_bits(
    experts: int, hidden: int, intermediate: int, gated: bool, transposed: bool, layout: str, dtype: Any
) -> None:
    columns = 2 * intermediate if gated else intermediate
    up = weights((experts, hidden, columns) if transposed else (experts, columns, hidden), dtype)
    down = weights((experts, intermediate, hidden) if transposed else (experts, hidden, intermediate), dtype)
    packed_up = packing.pack_up(up, gated=gated, layout=layout, transposed=transposed)
    packed_down = packing.pack_down(down, transposed=transposed)
    assert packed_up.dtype == up.dtype and packed_down.dtype == down.dtype
    back = packing.unpack_up(packed_up, intermediate, gated=gated, layout=layout, transposed=transposed)
    assert back.shape == up.shape and bits(back) == bits(up)
    back = packing.unpack_down(packed_down, hidden, transposed=transposed)
    assert back.shape == down.shape and bits(back) == bits(down)


def test_a_layout_and_its_transpose_pack_to_the_same_bits() -> None:
    up, down = weights((2, 80, 24)), weights((2, 24, 40))
    swapped_up, swapped_down = np.swapaxes(up, 1, 2).copy(), np.swapaxes(down, 1, 2).copy()
    assert bits(packing.pack_up(up)) == bits(packing.pack_up(swapped_up, transposed=True))
    assert bits(packing.pack_down(down)) == bits(packing.pack_down(swapped_down, transposed=True))
    assert bits(packing.pack_up(up)) != bits(packing.pack_up(up, layout="interleaved"))


def test_the_result_goes_where_it_is_asked_to(tmp_path: Any) -> None:
    up = weights((2, 70, 9))
    shape = (2, packing.up_panels(35, True), 9, 64)
    mapped = np.memmap(tmp_path / "up.bin", np.float32, "w+", shape=shape)
    assert packing.pack_up(up, out=mapped) is mapped
    mapped.flush()
    assert (tmp_path / "up.bin").read_bytes() == bits(packing.pack_up(up))


def test_wrong_input_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="up: shape"):
        packing.pack_up(weights((4, 4)))
    with pytest.raises(UsageError, match="up: 7 gate and up columns"):
        packing.pack_up(weights((1, 7, 4)))
    with pytest.raises(UsageError, match="down: shape"):
        packing.pack_down(weights((0, 4, 4)))
    with pytest.raises(UsageError, match="layout.*'mixed'"):
        packing.pack_up(weights((1, 8, 4)), layout="mixed")
    with pytest.raises(UsageError, match=r"packed up.*I = 99"):
        packing.unpack_up(packing.pack_up(weights((1, 8, 4))), 99)
    with pytest.raises(UsageError, match=r"packed down.*H = 65"):
        packing.unpack_down(packing.pack_down(weights((1, 64, 4))), 65)
    with pytest.raises(UsageError, match="out of packed down"):
        packing.pack_down(weights((1, 64, 4)), out=np.empty((1, 1, 4, 32), np.float32))
