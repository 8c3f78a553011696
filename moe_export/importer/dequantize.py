"""Formulas of published quantised checkpoints: packed tensors → the float weights they stand for.

Sources: FP8 in blocks: DeepSeek-V3 technical report, "Fine-Grained Quantization", and its checkpoint's
``weight_scale_inv``; MXFP4: OCP Microscaling Formats (MX) Specification 1.0 (elements E2M1, scales E8M0), as
gpt-oss lays it out; GPTQ: the layout of AutoGPTQ and GPTQModel; AWQ: AutoAWQ's ``gemm`` layout.

Every product is of a float32 and a number of few bits, rounded once, to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_export.errors import SourceError

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 to 7; codes 8 to 15 are their negatives."""
MXFP4_BLOCK = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of the eight that share a word, whose code lies in place 0, 1, ..., lowest bits first."""
_ROWS = 512
"""Rows of a matrix that are computed at a time, so that intermediate results stay small."""


def fp8_blocks(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int] | None) -> torch.Tensor:
    """float32 [..., R, C] of ``weight`` (a float8 dtype, [..., R, C]) times its blocks' scales.

    ``scale``: [..., ceil(R / block[0]), ceil(C / block[1])], the last block of a row or column may be cut
    short; one element where ``block`` is None. A float dtype; or bytes, which are E8M0 codes.
    """
    import torch

    factors = (_e8m0(scale) if scale.dtype == torch.uint8 else scale).to(torch.float32)
    values = weight.to(torch.float32)
    if block is None:
        return values.mul_(factors.reshape(()))
    rows, columns = weight.shape[-2:]
    for begin in range(0, rows, block[0]):
        wide = factors[..., begin // block[0], :].repeat_interleave(block[1], dim=-1)[..., :columns]
        values[..., begin : begin + block[0], :].mul_(wide.unsqueeze(-2))
    return values


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., G * 32, N] of ``blocks`` uint8 [..., N, G, 16] and ``scales`` uint8 [..., N, G], which
    are E8M0 codes.

    Byte i of a block holds elements 2i (low half) and 2i + 1. bfloat16 holds every value exactly. gpt-oss
    quantises along the inputs of a layer and its model has them first: hence the transpose.
    """
    import torch

    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = table[codes.int()].mul_(_e8m0(scales).to(torch.float32).unsqueeze(-1))
    return values.to(torch.bfloat16).flatten(-2).transpose(-1, -2).contiguous()


def gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    group: torch.Tensor,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    """float32 [N, D] (``torch.nn.Linear``'s layout) of a matrix whose codes are packed along its inputs.

    ``qweight`` int32 [D * bits / 32, N], lowest bits first; ``qzeros`` int32 [G, N * bits / 32]; ``scales``
    [G, N]; ``group`` [D]: the group of each input (``g_idx``). ``zero_offset``: what is added to a stored
    zero point, modulo 2**bits: 1 in the format ``gptq``, 0 in ``gptq_v2``.

    Raises:
        SourceError: a group is outside 0 to G - 1.
    """
    import torch

    groups = scales.shape[0]
    wrong = ((group < 0) | (group >= groups)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise SourceError(
            f"g_idx puts input {at} into group {int(group[at])}, and there are groups 0 to {groups - 1} only"
        )
    index = group.long()
    order = tuple(range(32 // bits))
    zeros = (_unpacked(qzeros, bits, order).int() + zero_offset) % (1 << bits)
    zero_points, factors = zeros.t().to(torch.float32), scales.t().to(torch.float32)  # [N, G]
    values = torch.empty(qweight.shape[1], len(group), dtype=torch.float32)
    for begin in range(0, len(values), _ROWS):
        rows = slice(begin, begin + _ROWS)
        codes = _unpacked(qweight[:, rows].t(), bits, order).to(torch.float32)
        values[rows] = codes.sub_(zero_points[rows][:, index]).mul_(factors[rows][:, index])
    return values


def awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [N, D] of a 4-bit matrix whose codes are packed along its outputs, in AWQ's order.

    ``qweight`` int32 [D, N / 8]; ``qzeros`` int32 [G, N / 8]; ``scales`` [G, N]; D / G inputs in a row share
    a zero point and a scale.
    """
    import torch

    size = qweight.shape[0] // scales.shape[0]
    zeros = _unpacked(qzeros, 4, AWQ_ORDER).to(torch.float32)
    values = torch.empty(scales.shape[1], qweight.shape[0], dtype=torch.float32)
    for group, factors in enumerate(scales.to(torch.float32)):
        inputs = slice(group * size, (group + 1) * size)
        codes = _unpacked(qweight[inputs], 4, AWQ_ORDER).to(torch.float32)
        values[:, inputs] = codes.sub_(zeros[group]).mul_(factors).t()
    return values


def _unpacked(words: torch.Tensor, bits: int, order: Sequence[int]) -> torch.Tensor:
    """uint8 [M, K * 32 / bits] of int32 [M, K]; the code in place i of a word is that of column order[i]."""
    import torch

    codes = torch.empty(*words.shape, len(order), dtype=torch.uint8)
    for place, column in enumerate(order):
        codes[..., column] = (words >> (bits * place)) & ((1 << bits) - 1)
    return codes.flatten(-2)


def _e8m0(codes: torch.Tensor) -> torch.Tensor:
    """Powers of two, of their codes as uint8."""
    import torch

    return codes.contiguous().view(torch.float8_e8m0fnu)
