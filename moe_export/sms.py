"""NVIDIA GPUs by compute capability ("SM"): which a target builds engines for, and which dtypes each
computes in.

Sources: the enumeration ``ComputeCapability`` of TensorRT-RTX 1.7 and its refusals, measured by building;
NVIDIA's support matrices of TensorRT for what cannot be built here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_export.errors import UsageError

GPU_TARGETS: tuple[str, ...] = ("tensorrt-rtx", "tensorrt")
"""Targets whose engines run on an NVIDIA GPU only."""


@dataclass(frozen=True)
class Sm:
    """A compute capability: 89 is 8.9. ``gpus``: boards that have it."""

    number: int
    gpus: str
    targets: tuple[str, ...]


_BOTH = GPU_TARGETS
SMS: dict[int, Sm] = {
    sm.number: sm
    for sm in (
        Sm(75, "T4, RTX 20", _BOTH),
        Sm(80, "A100, A30", _BOTH),
        Sm(86, "A10, A40, RTX 30", _BOTH),
        Sm(89, "L4, L40S, RTX 40", _BOTH),
        Sm(90, "H100, H200", ("tensorrt",)),
        Sm(100, "B200", ("tensorrt",)),
        Sm(103, "B300", ("tensorrt",)),
        Sm(110, "Jetson Thor", ("tensorrt",)),
        Sm(120, "RTX 50, RTX PRO Blackwell", _BOTH),
        Sm(121, "DGX Spark", _BOTH),
    )
}

FIRST_SM: dict[str, dict[str, int]] = {
    "tensorrt-rtx": {"float32": 80, "float16": 75, "bfloat16": 80, "float8": 89, "mxfp8": 89, "nvfp4": 120},
    "tensorrt": {"float32": 75, "float16": 75, "bfloat16": 80, "float8": 89, "mxfp8": 100, "nvfp4": 100},
}
"""Target → dtype → the lowest SM that computes in it. moe-export writes the first three."""


def sms_of(target: str) -> tuple[int, ...]:
    """The SMs ``target`` builds engines for."""
    return tuple(number for number, sm in SMS.items() if target in sm.targets)


def check_sms(target: str, numbers: Iterable[object]) -> tuple[int, ...]:
    """``numbers`` as a sorted tuple.

    Raises:
        UsageError: one of them is no SM of ``target``, or stands there twice; the message lists the choices.
    """
    known = sms_of(target)
    choices = "choices: " + ", ".join(str(n) for n in known)
    found = []
    for number in numbers:
        if type(number) is not int:
            raise UsageError(f"sm: expected whole numbers, as in [80, 89], got {number!r}; {choices}")
        if number in SMS and number not in known:
            other = next(t for t in SMS[number].targets)
            raise UsageError(
                f"sm: target {target} has no SM{number} ({SMS[number].gpus}); {choices}; target {other} "
                "has it"
            )
        if number not in known:
            raise UsageError(f"sm: unknown value {number}; {choices} (89 is compute capability 8.9)")
        if number in found:
            raise UsageError(f"sm: {number} is named twice")
        found.append(number)
    if not found:
        raise UsageError(f"sm: an empty list; {choices}")
    return tuple(sorted(found))


def check_dtype(target: str, dtype: str, numbers: Iterable[int], writes: tuple[str, ...]) -> None:
    """Refuse a dtype that one of the SMs lacks, or that moe-export does not write for ``target``.

    Raises:
        UsageError: names the limit and the choices.
    """
    first = FIRST_SM[target].get(dtype)
    if first is None:
        return
    lacking = [n for n in numbers if n < first]
    has = [n for n in sms_of(target) if n >= first]
    if lacking:
        raise UsageError(
            f"dtype: SM{lacking[0]} ({SMS[lacking[0]].gpus}) does not compute in {dtype}, which needs "
            f"SM{first} or "
            f"later ({', '.join(str(n) for n in has)}); dtypes of SM{lacking[0]}: "
            f"{', '.join(d for d in writes if FIRST_SM[target][d] <= lacking[0])}"
        )
    if dtype not in writes:
        raise UsageError(
            f"dtype: moe-export writes no {dtype} engines (SM{first} and later compute in it); choices: "
            f"{', '.join(writes)}"
        )
