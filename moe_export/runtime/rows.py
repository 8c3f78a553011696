"""Dealing the rows of a batch out to ranks, and putting what the ranks computed together again.

Rank *r* of R gets the rows r*b to (r+1)*b - 1 of a batch of B, b = ceil(B / R). All ranks run b rows, since
they exchange blocks of equal size: where there is no row left, the last one is repeated, and what is
computed for the repetition is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import BundleError
from moe_export.schema import ModelIO

Array = NDArray[Any]


@dataclass(frozen=True)
class Deal:
    """How ``batch`` rows lie on ``ranks`` ranks."""

    batch: int
    ranks: int

    @property
    def rows(self) -> int:
        """Rows that each rank runs."""
        return -(-self.batch // self.ranks)

    def own(self, rank: int) -> int:
        """How many of the rows of ``rank`` are not repetitions."""
        return min(max(self.batch - rank * self.rows, 0), self.rows)

    def part(self, array: Array, rank: int) -> Array:
        """The rows of ``rank``. The leading axis is the batch, or a multiple of it, batch first."""
        rows = np.minimum(np.arange(rank * self.rows, (rank + 1) * self.rows), self.batch - 1)
        each = len(array) // self.batch
        grouped = array.reshape(self.batch, each, *array.shape[1:])
        return np.ascontiguousarray(grouped[rows].reshape(self.rows * each, *array.shape[1:]))

    def parts(self, arrays: Mapping[str, Array], rank: int) -> dict[str, Array]:
        """:meth:`part` of each array."""
        return {name: self.part(array, rank) for name, array in arrays.items()}

    def without_repetitions(self, arrays: Mapping[str, Array], rank: int) -> dict[str, Array]:
        """What ``rank`` computed for rows of its own."""
        own, rows = self.own(rank), self.rows
        return {name: array[: len(array) // rows * own] for name, array in arrays.items()}


def joined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The whole of each array from the parts of the ranks in their order."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_rows_lead(io: ModelIO, label: str) -> None:
    """Refuse an engine whose inputs or outputs cannot be dealt out by rows.

    Raises:
        BundleError: the first input or output whose leading axis is not the batch.
    """
    for spec in (*io.inputs, *io.outputs):
        if not spec.shape or spec.shape[0] != "batch":
            raise BundleError(
                f"{label}: {spec.name!r} has shape {list(spec.shape)}; with ep_mode alltoall each must begin "
                "with the batch; build it with --ep-mode allreduce"
            )
