"""Number formats of weights: bits per weight with their scales, and which parts of a model they cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_export.errors import UsageError, choices_text

Compute = Literal["float32", "bfloat16", "float8"]

LAYER_PARTS = frozenset({"attention", "routed_experts", "shared_experts", "dense_layers"})
"""Parts that 8-bit and 4-bit formats of whole layers quantise; the rest stays in 16 bits."""


@dataclass(frozen=True)
class WeightFormat:
    """``bits`` per weight of the ``parts`` it covers (all parts if None), scales included; 16 elsewhere.

    ``compute``: the number format that the matrix units multiply in.
    """

    name: str
    bits: float
    compute: Compute
    parts: frozenset[str] | None
    about: str

    @property
    def activation_bytes(self) -> int:
        """Bytes per number between kernels: 4 for float32, 2 for all others."""
        return 4 if self.compute == "float32" else 2

    def bits_of(self, part: str) -> float:
        """Bits per parameter of a part of the model (a component's name)."""
        return self.bits if self.parts is None or part in self.parts else 16.0

    def bytes_of(self, parameters: dict[str, int]) -> int:
        """Bytes of parameters given by part, rounded up."""
        bits = sum(count * self.bits_of(part) for part, count in parameters.items())
        return -int(-bits // 8)


FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat("float32", 32, "float32", None, "all weights in 32 bits"),
        WeightFormat("bfloat16", 16, "bfloat16", None, "all weights in 16 bits"),
        WeightFormat("float16", 16, "bfloat16", None, "all weights in 16 bits"),
        WeightFormat(
            "float8", 8 + 32 / 128**2, "float8", LAYER_PARTS,
            "the layers' matrices in 8 bits with a float32 scale per 128 x 128 block, as DeepSeek-V3's",
        ),
        WeightFormat(
            "int8", 8 + 16 / 128, "bfloat16", LAYER_PARTS,
            "the layers' matrices in 8 bits with a 16-bit scale per 128 weights, multiplied in 16 bits",
        ),
        WeightFormat(
            "int4", 4 + 20 / 128, "bfloat16", LAYER_PARTS,
            "the layers' matrices in 4 bits with a 16-bit scale and a 4-bit zero per 128 weights (GPTQ, AWQ)",
        ),
        WeightFormat(
            "mxfp4", 4.25, "bfloat16", frozenset({"routed_experts"}),
            "the routed experts in 4 bits with an 8-bit scale per 32 weights, as gpt-oss is published",
        ),
    )
}  # fmt: skip


_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8"}


def weight_format(name: str) -> WeightFormat:
    """The format called ``name``, or known by it for short (``fp8``).

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    known = _SHORT.get(name.lower(), name.lower())
    if known not in FORMATS:
        raise UsageError(f"no weight format {name!r}; {choices_text(known, FORMATS)}")
    return FORMATS[known]
