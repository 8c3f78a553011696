"""Reads fields of a model's config with checks, and says which field is wrong and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_export.errors import SourceError


class MissingFieldError(SourceError):
    """A field that the arithmetic needs is not in the config; transformers' own default may stand in."""


class Fields:
    """The values of a ``config.json``. ``where`` names it in errors.

    Every method raises :class:`SourceError` for a value of a wrong kind, and :class:`MissingFieldError` for
    one that is not there and has no default.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def size(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``, under the first of ``names`` that is there."""
        found = self.optional_size(*names, least=least)
        if found is not None:
            return found
        if default is None:
            raise MissingFieldError(
                f"{self.where}: the field {names[0]!r} is missing; expected a whole number"
            )
        return default

    def optional_size(self, *names: str, least: int = 1) -> int | None:
        """The same, or None where it is missing or null."""
        name = next((n for n in names if self.values.get(n) is not None), None)
        if name is None:
            return None
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SourceError(
                f"{self.where}: {name!r} is {value!r}; expected a whole number of at least {least}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise SourceError(f"{self.where}: {name!r} is {value!r}; expected true or false")
        return value

    def given(self, name: str) -> bool:
        """Whether the field is there at all, null or not."""
        return name in self.values

    def words(self, name: str, count: int, choices: tuple[str, ...]) -> tuple[str, ...] | None:
        """``count`` words, each one of ``choices``; None where the field is missing or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(v in choices for v in value):
            raise SourceError(
                f"{self.where}: {name!r} is {str(value)[:80]}; expected {count} words of {', '.join(choices)}"
            )
        return tuple(value)

    def indices(self, name: str) -> tuple[int, ...] | None:
        """Layer numbers; None where the field is missing or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            raise SourceError(f"{self.where}: {name!r} is {str(value)[:80]}; expected layer numbers from 0")
        return tuple(value)

    def part(self, name: str) -> Fields:
        """The fields of a nested object."""
        value = self.values.get(name)
        if value is None:
            raise MissingFieldError(f"{self.where}: the field {name!r} is missing; expected an object")
        if not isinstance(value, dict):
            raise SourceError(f"{self.where}: {name!r} is {value!r}; expected an object")
        return Fields(value, f"{self.where}: {name}")

    def dtype(self) -> str:
        """The config's own ``dtype`` (``torch_dtype`` in older files); float32 where it says nothing."""
        value = self.values.get("dtype", self.values.get("torch_dtype"))
        return "float32" if value is None else str(value).removeprefix("torch.")
