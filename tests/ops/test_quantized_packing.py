"""The packed layout of quantised experts: what it stands for, by hand and by the inverse; refusals."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_export.errors import UsageError
from moe_export.ops.quantization import Quantized, dequantize, interleave, quantize
from moe_export.ops.quantized_packing import pack_quantized_down, pack_quantized_up, unpack

E, H, INNER = 2, 64, 48


def quantized(rows: int, depth: int, bits: int, block: int = 16) -> Quantized:
    weights = np.random.default_rng([rows, depth]).standard_normal((E, rows, depth), dtype=np.float32)
    return quantize(weights, bits, block)


def nibble(codes: NDArray[np.uint8], e: int, panel: int, k: int, column: int) -> int:
    """One signed 4-bit code by the module's text, read from a little-endian word."""
    word = int.from_bytes(codes[e, panel, k // 8, column].tobytes(), "little")
    value = word >> (4 * (k % 8)) & 15
    return value - 16 if value > 7 else value


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_by_hand(bits: int) -> None:
    up, down = quantized(2 * INNER, H, bits), quantized(H + 8, INNER, bits)
    packed_up, packed_down = pack_quantized_up(up), pack_quantized_down(down)
    assert packed_up.codes.dtype == (np.int8 if bits == 8 else np.uint8)
    assert packed_up.scales.shape == (E, 2, H // 16, 64) and packed_down.scales.shape == (
        E,
        2,
        INNER // 16,
        64,
    )
    for e, i, k in [(0, 0, 0), (1, 47, 63), (0, 33, 17), (1, 31, 9)]:
        for is_up in (0, 1):
            panel, column = i // 32, is_up * 32 + i % 32
            code = (
                int(packed_up.codes[e, panel, k, column])
                if bits == 8
                else nibble(packed_up.codes, e, panel, k, column)
            )
            got = code * float(packed_up.scales[e, panel, k // 16, column])
            assert got == pytest.approx(float(dequantize(up)[e, is_up * INNER + i, k]), rel=1e-6)
    for e, h, k in [(0, 0, 0), (1, 71, 47), (0, 64, 20)]:
        panel, column = h // 64, h % 64
        codes = packed_down.codes
        code = int(codes[e, panel, k, column]) if bits == 8 else nibble(codes, e, panel, k, column)
        got = code * float(packed_down.scales[e, panel, k // 16, column])
        assert got == pytest.approx(float(dequantize(down)[e, h, k]), rel=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_the_inverse_gives_the_weights_of_the_codes(bits: int, gated: bool) -> None:
    for rows in (32, 2 * INNER, 128, 66):
        plain = quantized(rows, H, bits)
        packed = pack_quantized_up(plain, gated=gated) if gated else pack_quantized_down(plain)
        np.testing.assert_array_equal(
            unpack(packed.codes, packed.scales, rows, gated=gated), dequantize(plain)
        )
        assert packed.nbytes == packed.codes.nbytes + packed.scales.nbytes


@pytest.mark.parametrize("bits", [8, 4])
def test_layouts_of_gate_and_up_give_the_same_panels(bits: int) -> None:
    plain = quantized(2 * INNER, H, bits)
    pairs = Quantized(
        interleave(plain.codes, "concatenated"), interleave(plain.scales, "concatenated"), bits, plain.block
    )
    one, other = pack_quantized_up(plain), pack_quantized_up(pairs, layout="interleaved")
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scales, other.scales)


def test_columns_past_the_last_are_zero() -> None:
    packed = pack_quantized_down(quantized(8, H, 4))
    assert not packed.codes[:, :, :, 8:].any() and not packed.scales[:, :, :, 8:].any()
    assert packed.codes[:, :, :, :8].any()


def test_refusals() -> None:
    weights = np.ones((1, 4, 12), np.float32)
    with pytest.raises(UsageError, match="blocks of 4; packed codes need a multiple of 8"):
        pack_quantized_down(quantize(weights, 8, 4))
    with pytest.raises(UsageError, match="97 gate and up columns; expected an even number"):
        pack_quantized_up(quantized(97, H, 8))
    with pytest.raises(UsageError, match="layout: unknown value 'mixed'"):
        pack_quantized_up(quantized(96, H, 8), layout="mixed")
    packed = pack_quantized_down(quantized(64, H, 8))
    with pytest.raises(UsageError, match="codes float32"):
        unpack(packed.codes.astype(np.float32), packed.scales, 64, gated=False)
    for wrong in (packed.scales[0], packed.scales[:, :, :3], packed.scales[:, :, :, :32]):
        with pytest.raises(UsageError, match="do not go with codes of shape"):
            unpack(packed.codes, wrong, 64, gated=False)
