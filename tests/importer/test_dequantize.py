"""Formulas of quantised checkpoints, beside transformers' own where those run on a CPU, else by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_export.errors import SourceError
from moe_export.importer.dequantize import awq, fp8_blocks, gptq, mxfp4
from tests.helpers import published


def random_fp8(*shape: int) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    return numbers.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(256, 384), (3, 256, 128)])
def test_fp8_is_what_transformers_computes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = random_fp8(*shape)
    scale = (torch.rand(*shape[:-2], shape[-2] // 128, shape[-1] // 128) + 0.01).to(dtype)
    if len(shape) == 3:
        pairs = zip(weight, scale, strict=True)
        wanted = torch.stack([Fp8Dequantize(None)._dequantize_one(w, s, torch.float32) for w, s in pairs])
    else:
        wanted = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(fp8_blocks(weight, scale, (128, 128)), wanted)
    if dtype == torch.float8_e8m0fnu:
        assert torch.equal(fp8_blocks(weight, scale.view(torch.uint8), (128, 128)), wanted)
    swapped = scale.float().flip(-2)
    assert not torch.equal(fp8_blocks(weight, swapped, (128, 128)), wanted)


def test_the_last_block_of_fp8_may_be_cut_short() -> None:
    """As DeepSeek-V3's ``kv_a_proj_with_mqa``, of 576 rows."""
    weight, scale = random_fp8(576, 200), torch.rand(5, 2) + 0.5
    got = fp8_blocks(weight, scale, (128, 128))
    for row, column in ((0, 0), (127, 127), (128, 128), (575, 199), (512, 0), (511, 199)):
        wanted = weight[row, column].float() * scale[row // 128, column // 128]
        assert got[row, column] == wanted


def test_fp8_of_one_scale() -> None:
    weight = random_fp8(7, 5)
    for scale in (torch.tensor(0.25), torch.tensor([0.25])):
        assert torch.equal(fp8_blocks(weight, scale, None), weight.float() / 4)


def test_every_code_and_scale_of_mxfp4() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    blocks = codes.view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16).contiguous()
    got = mxfp4(blocks, scales).float()
    assert got.shape == (1, 512, 255)
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = torch.tensor([*positive, *(-v for v in positive)], dtype=torch.float64)
    element = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1).flatten()
    wanted = element[:, None] * torch.pow(2.0, torch.arange(255, dtype=torch.float64) - 127)
    fits = wanted.abs() < 2.0**128
    assert torch.equal(got[0].double()[fits], wanted[fits])
    # transformers raises a scale's exponent in steps that lose the smallest numbers.
    usual = scales[0, :, 0].long().sub(127).abs() < 100
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(got[0][:, usual], theirs[0][:, usual])
    assert not torch.equal(mxfp4(blocks.flip(-1), scales), mxfp4(blocks, scales))


def test_a_scale_that_is_nan_gives_no_number() -> None:
    blocks = torch.full((1, 1, 1, 16), 0x22, dtype=torch.uint8)
    assert bool(mxfp4(blocks, torch.full((1, 1, 1), 255, dtype=torch.uint8)).isnan().all())


sizes = st.sampled_from([8, 16, 24, 64])


@settings(max_examples=25, deadline=None)
@given(
    outputs=sizes,
    inputs=st.sampled_from([32, 64, 96]),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([8, 32, -1]),
    desc_act=st.booleans(),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    seed=st.integers(0, 1 << 30),
)
def test_gptq_gives_the_packed_numbers(
    outputs: int, inputs: int, bits: int, group: int, desc_act: bool, version: str, seed: int
) -> None:
    outputs = -(-outputs * bits // 32) * 32 // bits
    matrix = np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)
    stored, wanted = published.gptq(bits, group, desc_act, version).write("weight", matrix)
    parts = [torch.from_numpy(stored[n]) for n in ("qweight", "qzeros", "scales", "g_idx")]
    offset = int(version == "gptq")
    assert np.array_equal(gptq(*parts, bits, offset).numpy(), wanted)
    assert not np.array_equal(gptq(*parts, bits, 1 - offset).numpy(), wanted)


def test_gptq_zero_points_wrap_and_matrices_of_many_rows() -> None:
    """A zero point of 0 is stored as 15 in the format that stores one less."""
    codes = np.random.default_rng(0).integers(0, 16, (1040, 8))
    words = torch.from_numpy(published._words(codes.T, 4, 0))
    zeros = torch.full((1, 130), -1, dtype=torch.int32)
    got = gptq(words, zeros, torch.ones(1, 1040), torch.zeros(8, dtype=torch.int32), 4, 1)
    assert np.array_equal(got.numpy(), codes)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_group_that_is_not_there(wrong: int) -> None:
    stored, _ = published.gptq().write("weight", np.ones((8, 32), np.float32))
    parts = [torch.from_numpy(stored[n]) for n in ("qweight", "qzeros", "scales", "g_idx")]
    parts[3][5] = wrong
    with pytest.raises(SourceError, match=f"input 5 into group {wrong}, and there are groups 0 to 3 only"):
        gptq(*parts, 4, 1)


@settings(max_examples=25, deadline=None)
@given(
    outputs=sizes,
    inputs=st.sampled_from([32, 64]),
    group=st.sampled_from([8, 32]),
    seed=st.integers(0, 99),
)
def test_awq_gives_the_packed_numbers(outputs: int, inputs: int, group: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)
    stored, wanted = published.awq(group).write("weight", matrix)
    parts = {n: torch.from_numpy(stored[n]) for n in ("qweight", "qzeros", "scales")}
    got = awq(parts["qweight"], parts["qzeros"], parts["scales"]).numpy()
    assert np.array_equal(got, wanted)
    assert not np.array_equal(awq(parts["qweight"] >> 4, parts["qzeros"], parts["scales"]).numpy(), wanted)


def test_awqs_order_by_hand() -> None:
    """One word 0x75316420 holds the columns 0 to 7 in their order."""
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    got = awq(word, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8, dtype=torch.float16))
    assert got.flatten().tolist() == list(range(8))


def test_the_helpers_fp8_is_ml_dtypes_rounding() -> None:
    """The numbers that readers are compared with are near the ones that were quantised."""
    matrix = np.random.default_rng(1).standard_normal((40, 24)).astype(np.float32)
    for form, far in (
        (published.fp8(), 0.07),
        (published.fp8(None), 0.07),
        (published.gptq(8), 0.02),
        (published.gptq(desc_act=True), 0.25),
        (published.awq(), 0.25),
    ):
        stored, values = form.write("weight", matrix)
        assert np.abs(values - matrix).max() < far * np.abs(matrix).max()
        assert not any(t.dtype == np.float32 and t.shape == matrix.shape for t in stored.values())
    assert stored["scales"].dtype == np.float16
    codes = published.fp8().write("weight", matrix)[0]["weight"]
    assert codes.dtype == ml_dtypes.float8_e4m3fn
