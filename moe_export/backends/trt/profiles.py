"""Optimisation profiles: the smallest, usual and largest shape of every input of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_export.errors import UsageError
from moe_export.schema import ExpertParallel, Limits, ModelIO

DEFAULT_BATCH = 4
DEFAULT_SEQUENCE = 2048
"""Limits of an engine where none were asked for: TensorRT sets memory aside for the largest shape."""
OTHER_DIMENSION = 1024
"""Largest size of a free dimension that neither ``max_batch`` nor ``max_sequence`` speaks of."""
_USUAL_PREFILL = 128
_USUAL_CAPACITY = 64

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """``shapes``: input → smallest, usual and largest shape.

    Raises:
        UsageError: a dimension is not smallest <= usual <= largest; the message names the input.
    """

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def __post_init__(self) -> None:
        for name, (low, usual, high) in self.shapes.items():
            if not len(low) == len(usual) == len(high):
                raise UsageError(
                    f"profile {self.name!r}: input {name!r} has shapes of {len(low)}, {len(usual)} and "
                    f"{len(high)} axes"
                )
            for axis, (a, b, c) in enumerate(zip(low, usual, high, strict=True)):
                if not 0 <= a <= b <= c:
                    raise UsageError(
                        f"profile {self.name!r}: input {name!r}, axis {axis}: min {a}, opt {b}, max {c}; "
                        "expected "
                        "0 <= min <= opt <= max"
                    )

    def covers(self, shapes: Mapping[str, Shape]) -> str:
        """Empty where inputs of these shapes fit; else which one does not, and what would."""
        for name, shape in shapes.items():
            if name not in self.shapes:
                continue
            low, _, high = self.shapes[name]
            fits = len(shape) == len(low) and all(
                a <= n <= b for a, n, b in zip(low, shape, high, strict=True)
            )
            if not fits:
                return f"{name} of shape {list(shape)} is outside {list(low)} ... {list(high)}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """As ``build_engine.json`` holds it."""
        return {
            "name": self.name,
            "shapes": {name: [list(shape) for shape in three] for name, three in self.shapes.items()},
        }


def engine_limits(limits: Limits, *, asked: bool) -> Limits:
    """The limits an engine is built for.

    ``asked``: whether ``max_sequence`` is the user's own; what only the model allows is cut to
    :data:`DEFAULT_SEQUENCE`.
    """
    sequence = limits.max_sequence or DEFAULT_SEQUENCE
    return Limits(limits.max_batch or DEFAULT_BATCH, sequence if asked else min(sequence, DEFAULT_SEQUENCE))


def make_profiles(
    io: ModelIO, limits: Limits, *, split: bool, parallel: ExpertParallel | None = None
) -> tuple[Profile, ...]:
    """Profiles for an engine with ``limits`` (both set), or for one rank of it.

    ``split``: an engine over a KV cache gets two: ``decode`` (one new token after a past) and ``prefill``
    (any
    number of new tokens after any past, none included); the last covers everything. Otherwise there is one,
    ``all``, which is what TensorRT-RTX gets: it compiles kernels for the shapes it meets at run time, and its
    compiler fails on conditional experts under two profiles.
    """
    batch, longest = limits.max_batch, limits.max_sequence
    if batch is None or longest is None:
        raise UsageError("profiles need a largest batch and a largest sequence")
    senders = parallel.senders if parallel is not None else 1
    batch = -(-batch // senders)  # A rank's part of the sequences; to its experts all ranks send.
    usual = min(_USUAL_PREFILL, longest)
    grows = any("past" in spec.shape for spec in io.inputs)
    # A bucket of as many rows as there are tokens always suffices; the host asks for fewer.
    prefill = {
        "capacity": (1, min(_USUAL_CAPACITY, batch * longest), batch * longest * senders),
        "batch": (1, 1, batch),
        "sequence": (1, usual, longest),
        "past": (0, 0, longest - 1),
        "total": (1, usual, longest),
    }
    middle = max(longest // 2, 1)
    decode = {
        "capacity": (1, min(_USUAL_CAPACITY, batch), batch * senders),
        "batch": (1, 1, batch),
        "sequence": (1, 1, 1),
        "past": (0, middle - 1, longest - 1),
        "total": (1, middle, longest),
    }
    every = (("decode", decode), ("prefill", prefill)) if grows and split else (("all", prefill),)
    return tuple(Profile(name, _shapes(io, dims, longest)) for name, dims in every)


def _shapes(
    io: ModelIO, dims: Mapping[str, tuple[int, int, int]], longest: int
) -> dict[str, tuple[Shape, Shape, Shape]]:
    def at(shape: Iterable[int | str], which: int) -> Shape:
        return tuple(d if isinstance(d, int) else dims.get(d, _other(d, longest))[which] for d in shape)

    return {
        spec.name: (at(spec.shape, 0), at(spec.shape, 1), at(spec.shape, 2))
        for spec in io.inputs
        if any(isinstance(d, str) for d in spec.shape)
    }


def _other(symbol: str, longest: int) -> tuple[int, int, int]:
    most = longest if "sequence" in symbol else OTHER_DIMENSION
    return (1, min(_USUAL_PREFILL, most), most)


def require_covered(profiles: Iterable[Profile], cases: Iterable[tuple[str, Mapping[str, Shape]]]) -> None:
    """Every case (name, shapes of its inputs) fits at least one profile.

    Raises:
        UsageError: names the first case that does not, its input and the limits.
    """
    profiles = tuple(profiles)
    for name, shapes in cases:
        faults = [fault for profile in profiles if (fault := profile.covers(shapes))]
        if len(faults) == len(profiles):
            raise UsageError(
                f"the engine's profiles do not cover the parity input {name!r}: {faults[-1]}; raise "
                "max_batch "
                "(--max-batch) or max_sequence (--max-seq), or leave the verification out with --no-verify"
            )
