"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import BundleError, InputError

Array = NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy: the largest logit, the lowest id where
    several tie.

    Otherwise logits are divided by ``temperature``; ``top_k`` keeps the k most probable tokens, then
    ``top_p`` the smallest set of the most probable whose probabilities (of those kept) sum to at least p;
    equal ones by lower id.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature!r}; expected a number of 0 (greedy) or more")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"top_k is {self.top_k!r}; expected a whole number of 1 or more")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p is {self.top_p!r}; expected a number above 0 and at most 1")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise InputError(f"seed is {self.seed!r}; expected a whole number of 0 or more")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            name = "top_k" if self.top_k is not None else "top_p"
            raise InputError(f"{name} has no effect with temperature 0 (greedy); give a temperature above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Sampler:
    """Draws tokens for the sequences of a batch, each from its own stream of random numbers.

    Sequence i draws the same numbers whatever else is in the batch.
    """

    def __init__(self, sampling: Sampling, batch: int) -> None:
        self._sampling = sampling
        streams = np.random.SeedSequence(sampling.seed).spawn(batch) if sampling.temperature > 0 else []
        self._random = [np.random.default_rng(stream) for stream in streams]

    def choose(self, logits: Array, sequence: int) -> int:
        """The next token id of ``sequence`` from its ``logits`` [vocab].

        Raises:
            BundleError: the logits hold NaN or +infinity, or nothing but -infinity.
        """
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise BundleError(
                f"the engine gave the logit {logits[best]} for token {best} of sequence {sequence}; "
                "check the bundle with `moe-export verify`"
            )
        if self._sampling.temperature == 0:
            return best
        ids, shares = self.candidates(logits)
        sums = np.cumsum(shares)
        place = int(np.searchsorted(sums, self._random[sequence].random() * sums[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def candidates(self, logits: Array) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids that may be drawn and their probabilities, which sum to 1."""
        setting = self._sampling
        scaled = logits.astype(np.float64) / setting.temperature
        weights = np.exp(scaled - scaled.max())
        ids = np.arange(len(weights))
        if setting.top_k is not None and setting.top_k < len(weights):
            ids = largest(weights, setting.top_k)
        kept = weights[ids]
        if setting.top_p is not None:
            place = _nucleus(kept, setting.top_p)
            ids, kept = ids[place], kept[place]
        return ids, kept / kept.sum()


def largest(values: Array, count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, largest first, equal ones by lower index."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    ties = np.flatnonzero(values == least)[: count - len(above)]
    places = np.sort(np.concatenate([above, ties]))
    return places[np.argsort(-values[places], kind="stable")]


def _nucleus(weights: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """Indices of the smallest set of largest ``weights`` whose sum is at least ``share`` of the whole."""
    goal = share * weights.sum()
    count = 256
    while True:
        # A few tokens nearly always hold the share, so the whole vocabulary is rarely sorted.
        places = largest(weights, count)
        sums = np.cumsum(weights[places])
        if sums[-1] >= goal or count >= len(weights):
            return places[: int(np.searchsorted(sums, goal, side="left")) + 1]
        count *= 8
