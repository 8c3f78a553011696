"""Checks of single values of a configuration.

Each takes a field's name and its value, gives the value back as it is kept (tuples in place of lists), and
raises :class:`UsageError` that names the field and what it may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moe_export.errors import UsageError, choices_text
from moe_export.sms import GPU_TARGETS, check_sms, sms_of

Check = Callable[[str, Any], Any]
MAX_SEED = 2**32 - 1


def boolean(name: str, value: object) -> bool:
    """True or false, and nothing that only counts as such."""
    if type(value) is not bool:
        raise UsageError(f"{name}: expected true or false, got {value!r}")
    return value


def one_of(choices: Iterable[str], *, optional: bool = False) -> Check:
    """One of ``choices``; None as well where it is ``optional``."""

    def check(name: str, value: Any) -> Any:
        if value is not None or not optional:
            check_choice(name, value, choices)
        return value

    return check


def count(name: str, value: Any) -> Any:
    """A whole number of 1 or more."""
    check_int(name, value, 1)
    return value


def optional_count(name: str, value: Any) -> Any:
    """None, or a whole number of 1 or more."""
    return None if value is None else count(name, value)


def at_least_zero(name: str, value: Any) -> Any:
    """A whole number of 0 or more."""
    check_int(name, value, 0)
    return value


def optional_factor(name: str, value: Any) -> float | None:
    """None, or a finite number above 0."""
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise UsageError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def optional_file(name: str, value: Any) -> Any:
    """None, or a file's name."""
    if value is not None and (not isinstance(value, str) or not value):
        raise UsageError(f"{name}: expected a file's name, got {value!r}")
    return value


def seed(name: str, value: Any) -> Any:
    """What every random number generator in use takes."""
    check_int(name, value, 0, MAX_SEED)
    return value


def optional_sms(name: str, value: Any) -> Any:
    """None, or GPUs by compute capability that some target builds for."""
    if value is not None:
        check_list(name, value, "whole numbers, as in [80, 89]")
        check_sms(max(GPU_TARGETS, key=lambda target: len(sms_of(target))), value)
    return value


def optional_sizes(name: str, value: Any) -> tuple[int, ...] | None:
    """None, or whole numbers of 1 or more, none twice."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value:
        raise UsageError(f"{name}: expected a list of whole numbers, as in [1, 8], got {value!r}")
    for item in value:
        check_int(name, item, 1)
    if len(set(value)) != len(value):
        raise UsageError(f"{name}: {list(value)!r} names a size twice")
    return tuple(value)


def optional_names(choices: Sequence[str]) -> Check:
    """None, or a list of names out of ``choices``."""

    def check(name: str, value: Any) -> tuple[str, ...] | None:
        if value is None:
            return None
        check_list(name, value, "names")
        for item in value:
            check_choice(name, item, choices)
        return tuple(value)

    return check


def opset_of(opsets: Sequence[int], reasons: Mapping[int, str]) -> Check:
    """One of ``opsets``; ``reasons`` tells why a certain other one is refused."""

    def check(name: str, value: Any) -> Any:
        choices = f"choices: {', '.join(str(o) for o in opsets)}"
        if type(value) is not int:
            raise UsageError(f"{name}: expected a whole number, got {value!r}; {choices}")
        if value in opsets:
            return value
        if value in reasons:
            reason = reasons[value]
        elif value < min(opsets):
            reason = f"the exported operators need opset {min(opsets)} or later"
        else:
            reason = "this version of moe-export has not been tested with it"
        raise UsageError(f"{name}: {value} is refused: {reason}; {choices}")

    return check


def tolerances(name: str, value: Any) -> dict[str, float]:
    """Output name → largest error allowed there."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{name}: expected a table of output name = largest error, got {value!r}")
    for output, bound in value.items():
        if not isinstance(output, str) or not output:
            raise UsageError(f"{name}: expected an output name, got {output!r}")
        if type(bound) not in (int, float) or not math.isfinite(bound) or bound < 0:
            raise UsageError(f"{name}: {output!r}: expected a finite number of 0 or more, got {bound!r}")
    return {output: float(bound) for output, bound in value.items()}


def check_list(name: str, value: object, what: str) -> None:
    """``value`` is a list (of ``what``, for the message)."""
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{name}: expected a list of {what}, got {value!r}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """``value`` is one of ``choices``."""
    if not isinstance(value, str):
        raise UsageError(f"{name}: expected a text, got {value!r}; {choices_text('', choices)}")
    if value not in tuple(choices):
        raise UsageError(f"{name}: unknown value {value!r}; {choices_text(value, choices)}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """``value`` is a whole number from ``low`` to ``high``."""
    if type(value) is not int or value < low or (high is not None and value > high):
        span = f"from {low} to {high}" if high is not None else f"of {low} or more"
        raise UsageError(f"{name}: expected a whole number {span}, got {value!r}")


def check_below(name: str, sizes: tuple[int, ...] | None, limit_name: str, limit: int) -> None:
    """None of ``sizes`` is above ``limit``."""
    if sizes is not None and max(sizes) > limit:
        raise UsageError(
            f"{name}: {max(sizes)} is above {limit_name} = {limit}, so the engine would refuse it"
        )
