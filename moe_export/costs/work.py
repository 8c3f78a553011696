"""Arithmetic and memory traffic of kernels, from their shapes.

Traffic is what must cross the memory interface at least once: each weight once, each activation once in and
once out. ``each`` is bytes per activation. One multiply-add is two operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Operations, and bytes by what they are: weights, cached keys and values (or states), activations."""

    flops: float = 0.0
    weights: float = 0.0
    cache: float = 0.0
    activations: float = 0.0

    @property
    def bytes(self) -> float:
        return self.weights + self.cache + self.activations

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weights + other.weights,
            self.cache + other.cache,
            self.activations + other.activations,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(
            self.flops * factor, self.weights * factor, self.cache * factor, self.activations * factor
        )


def matmul(rows: float, inputs: int, outputs: int, bits: float, each: int = 2) -> Work:
    """``rows`` vectors of ``inputs`` numbers times one matrix of ``bits`` per weight. Nothing for no rows."""
    if rows <= 0:
        return Work()
    return grouped_matmul(rows, 1, ((inputs, outputs),), bits, each)


def grouped_matmul(
    rows: float, groups: float, shapes: Sequence[tuple[int, int]], bits: float, each: int = 2
) -> Work:
    """``rows`` vectors, each through the matrices (inputs, outputs) of one of several alike experts.

    ``groups``: experts that got at least one row; only their weights are read. Both may be expectations.
    """
    weights = sum(i * o for i, o in shapes)
    width = sum(i + o for i, o in shapes)
    return Work(
        flops=2.0 * rows * weights,
        weights=groups * weights * bits / 8,
        activations=rows * width * each,
    )


def elementwise(rows: float, width: int, passes: int, each: int = 2) -> Work:
    """``passes`` reads or writes of ``rows`` vectors (norms, residuals, gather and scatter of tokens)."""
    return Work(flops=float(rows * width * passes), activations=float(rows * width * passes * each))


def attention(flops: float, cache_bytes: float, rows: float, width: int, each: int = 2) -> Work:
    """The core of attention: ``cache_bytes`` read or written, ``rows`` queries in and results out."""
    return Work(flops=flops, cache=cache_bytes, activations=2.0 * rows * width * each)
