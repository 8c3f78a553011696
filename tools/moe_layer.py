"""One MoE layer to measure: shapes, weights, routings that are forced through router logits, its reference.

A layer here is everything from router logits on: softmax, top k, renormalise, expert MLPs (SwiGLU), weighted
sum. The router's matrix is left out, so that a routing can be forced by the logits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.bench.routing import forced_routing
from moe_export.ops import OPS
from moe_export.ops.quantization import BLOCK, KINDS, Quantized, quantize
from moe_export.schema import MoELayer

Array = NDArray[Any]
Run = Callable[[], Any]
"""Computes the layer once and returns its output, a NumPy array or a torch tensor [T, H]."""

DTYPES = ("float32", "bfloat16")
CHECKED_TOKENS = 48
"""Tokens whose output is compared with the reference: spread over all of them, first and last included."""


class LeftOut(Exception):
    """Why a contestant does not take part."""


@dataclass(frozen=True)
class Shape:
    """H hidden size, I intermediate size, E experts, K experts per token."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def expert_bytes(self, itemsize: int) -> int:
        """Bytes of one expert's three matrices."""
        return 3 * self.hidden * self.intermediate * itemsize

    def flops(self, assignments: int) -> int:
        """Additions and multiplications of the matrices for that many rows."""
        return 2 * 3 * self.hidden * self.intermediate * assignments


SHAPES = {
    s.name: s
    for s in (
        Shape("A", 1024, 2816, 16, 2),
        Shape("B", 1024, 512, 64, 8),
        Shape("C", 4096, 14336, 8, 2),  # Mixtral 8x7B's layer
        Shape("tiny", 64, 96, 4, 2),  # to try the program
    )
}


@dataclass(frozen=True)
class Inputs:
    """What all contestants get, and what the checked tokens must give."""

    hidden: Array  # float32 [T, H]
    logits: Array  # float32 [T, E]
    ids: Array  # int32 [T, K], what the logits choose
    checked: Array  # int64 [C], token numbers
    expected: Array  # float64 [C, H]

    @property
    def active(self) -> int:
        """Experts that some token chose."""
        return len(np.unique(self.ids))


class Layer:
    """Weights of one shape in one element type. ``up`` [E, 2I, H], gate rows first; ``down`` [E, H, I]."""

    def __init__(self, shape: Shape, dtype: str, seed: int = 0) -> None:
        import ml_dtypes

        self.shape = shape
        self.dtype = dtype
        self.numpy_dtype: Any = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
        rng = np.random.default_rng(seed)
        h, i, e = shape.hidden, shape.intermediate, shape.experts
        self.up = _aligned((e, 2 * i, h), self.numpy_dtype)
        self.down = _aligned((e, h, i), self.numpy_dtype)
        self._quantized: dict[str, tuple[Quantized, Quantized]] = {}
        for index in range(e):
            self.up[index] = rng.standard_normal((2 * i, h), np.float32) / np.float32(h**0.5)
            self.down[index] = rng.standard_normal((h, i), np.float32) / np.float32(i**0.5)

    @property
    def itemsize(self) -> int:
        return int(self.numpy_dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return int(self.up.nbytes + self.down.nbytes)

    def quantized(self, kind: str) -> tuple[Quantized, Quantized]:
        """Up and down matrices in ``int8`` or ``int4``, in blocks; computed once."""
        if kind not in self._quantized:
            self._quantized[kind] = (
                quantize(self.up, KINDS[kind], BLOCK),
                quantize(self.down, KINDS[kind], BLOCK),
            )
        return self._quantized[kind]

    def inputs(self, tokens: int, routing: str, seed: int = 0) -> Inputs:
        """Random tokens, and logits that choose the experts of ``routing`` (uniform, zipf, one-hot)."""
        rng = np.random.default_rng([seed, tokens])
        s = self.shape
        names = ("hidden", "ids", "weights", "out")
        described = MoELayer(0, "layer", s.experts, s.top_k, s.hidden, s.intermediate, *names)
        ids, _ = forced_routing(routing, described, tokens, seed)
        hidden = (
            rng.standard_normal((tokens, s.hidden), np.float32).astype(self.numpy_dtype).astype(np.float32)
        )
        logits = rng.uniform(-9.0, -8.0, (tokens, s.experts)).astype(np.float32)
        # Falling from 1.5 in steps far above rounding, so that every contestant chooses alike.
        chosen = 1.5 - 0.25 * np.arange(s.top_k) - 0.1 * rng.random((tokens, s.top_k))
        np.put_along_axis(logits, ids.astype(np.int64), chosen.astype(np.float32), axis=1)
        checked = np.unique(np.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS)).astype(np.int64))
        expected = self.reference(hidden[checked], logits[checked])
        return Inputs(hidden, logits, ids, checked, expected)

    def reference(self, hidden: Array, logits: Array) -> Array:
        """The contracts' float64 references, one expert at a time."""
        weights, ids = OPS["Router"].reference(logits, top_k=self.shape.top_k, renormalize=1)
        out = np.zeros(hidden.shape, np.float64)
        for expert in np.unique(ids):
            mine = np.where(ids == expert, 0, -1).astype(np.int32)
            up, down = self.up[expert : expert + 1], self.down[expert : expert + 1]
            out += OPS["ExpertMLP"].reference(hidden, mine, weights, up, down, num_experts=1)
        return out


def _aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array that begins on a cache line: ggml takes weights where they lie only then."""
    line = 64
    count = int(np.prod(shape)) * dtype.itemsize
    block = np.empty(count + line, np.uint8)
    begin = -block.ctypes.data % line
    return np.asarray(block[begin : begin + count].view(dtype).reshape(shape))


def need_memory(what: str, nbytes: int) -> None:
    """Raise LeftOut unless ``nbytes`` and a reserve are free: the kernel would end the whole run instead."""
    import psutil

    reserve = 2 * 2**30
    free = int(psutil.virtual_memory().available)
    if nbytes + reserve > free:
        raise LeftOut(
            f"{what} takes {nbytes / 2**30:.1f} GiB and a reserve of 2; {free / 2**30:.1f} GiB are free"
        )
