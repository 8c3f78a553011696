"""Block-wise quantisation: the formula, its error bounds, the layout that QMoE reads, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_export.errors import UsageError
from moe_export.ops.quantization import BLOCK, KINDS, Quantized, block_for, dequantize, interleave, quantize


def weights(shape: tuple[int, ...], seed: int = 0, scale: float = 0.05) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def by_hand(q: Quantized, e: int, n: int, d: int) -> float:
    """One weight by the module's text, without numpy's axes."""
    if q.bits == 8:
        code = int(q.codes[e, n, d])
    else:
        byte = int(q.codes[e, n, d // 2])
        code = byte >> 4 if d % 2 else byte & 15
    return (code - (128 if q.bits == 8 else 8)) * float(q.scales[e, n, d // q.block])


@pytest.mark.parametrize("bits", KINDS.values())
@pytest.mark.parametrize("block", [16, 32])
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
@settings(max_examples=20, deadline=None)
def test_no_weight_is_off_by_more_than_its_block_allows(
    bits: int, block: int, seed: int, scale: float
) -> None:
    w = weights((2, 3, 2 * block), seed, scale)
    q = quantize(w, bits, block)
    back = dequantize(q)
    step = np.repeat(np.abs(q.scales).astype(np.float64), block, axis=2)
    error = np.abs(back - w)
    # Beyond the largest code on the other side: at most one step; all others: at most half.
    top = 2 ** (bits - 1)
    beyond = w / np.repeat(q.scales.astype(np.float64), block, axis=2) > top - 1
    assert (error <= np.where(beyond, 1.0, 0.5) * step * (1 + 1e-5)).all()
    largest = np.abs(w.reshape(2, 3, 2, block)).max(axis=-1)
    np.testing.assert_allclose(np.abs(q.scales), largest / top, rtol=1e-6)
    # The largest weight of each block is exact.
    blocks, backs = w.reshape(2, 3, 2, block), back.reshape(2, 3, 2, block)
    place = np.abs(blocks).argmax(axis=-1)[..., None]
    np.testing.assert_allclose(
        np.take_along_axis(backs, place, -1), np.take_along_axis(blocks, place, -1), rtol=1e-6
    )


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.004, 0.006), (4, 0.08, 0.09)])
def test_error_of_normal_weights(bits: int, least: float, most: float) -> None:
    w = weights((2, 64, 1024), scale=1.0)
    rms = float(np.sqrt(((dequantize(quantize(w, bits)) - w) ** 2).mean()))
    assert least < rms < most  # the limits of verification are made from these


@pytest.mark.parametrize("bits", KINDS.values())
def test_dequantize_is_the_formula_of_the_text(bits: int) -> None:
    q = quantize(weights((2, 3, 64)), bits)
    assert q.codes.shape == (2, 3, 64 * bits // 8) and q.codes.dtype == np.uint8
    assert q.scales.shape == (2, 3, 2) and q.scales.dtype == np.float32
    back = dequantize(q)
    for e, n, d in np.ndindex(2, 3, 64):
        assert back[e, n, d] == by_hand(q, e, n, d)
    assert q.nbytes == q.codes.nbytes + q.scales.nbytes


def test_the_even_weight_lies_in_the_low_half() -> None:
    w = np.zeros((1, 1, 32), np.float32)
    w[0, 0, :2] = -8.0, 7.0
    q = quantize(w, 4)
    assert q.scales[0, 0, 0] == 1.0 and q.codes[0, 0, 0] == (0 | 15 << 4)


@pytest.mark.parametrize("bits", KINDS.values())
def test_zeros_and_numbers_too_small_for_a_scale(bits: int) -> None:
    for value in (0.0, 1e-45):
        q = quantize(np.full((1, 2, 32), value, np.float32), bits)
        assert np.abs(dequantize(q)).max() <= 1e-45


def test_gate_and_up_in_pairs() -> None:
    stack = np.arange(12).reshape(1, 6, 2)
    pairs = interleave(stack, "concatenated")
    assert pairs[0, :, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert interleave(pairs, "interleaved") is pairs
    bias = interleave(np.array([[1, 2, 3, 4]]), "concatenated")
    assert bias.tolist() == [[1, 3, 2, 4]]


def test_block_sizes() -> None:
    assert block_for(64, 96) == BLOCK == 32
    assert block_for(64, 48) == 16
    assert block_for(64, 40) is None and block_for(0, 32) is None


@pytest.mark.parametrize(
    ("shape", "bits", "block", "words"),
    [
        ((1, 2, 33), 8, 32, "33 inputs are no multiple of the block size 32"),
        ((2, 32), 8, 32, r"\[2, 32\]; expected \[E, N, D\]"),
        ((1, 2, 32), 3, 32, "3 bits; expected one of 8, 4"),
    ],
)
def test_wrong_sizes_are_refused(shape: tuple[int, ...], bits: int, block: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        quantize(np.zeros(shape, np.float32), bits, block)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = weights((3, 2, 32))
    w[1, 0, 5] = bad
    with pytest.raises(UsageError, match="expert 1 has weights that are not finite"):
        quantize(w, 4)


def test_wrong_layouts_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown layout 'mixed'"):
        interleave(np.zeros((1, 4)), "mixed")
    with pytest.raises(UsageError, match="3 gate and up rows"):
        interleave(np.zeros((1, 3)), "concatenated")
