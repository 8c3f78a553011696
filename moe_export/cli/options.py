"""Options and parameter types that several commands share."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from moe_export.errors import UsageError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Assignment(click.ParamType[tuple[str, float]]):
    """``NAME=VALUE`` with a number for VALUE: the value is ``(name, number)``."""

    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not name.strip() or not equals or not math.isfinite(number) or number < 0:
            self.fail(
                f"{value!r} is not NAME=VALUE with a number of 0 or more, as in logits=1e-4", param, ctx
            )
        return name.strip(), number


class IntList(click.ParamType[tuple[int, ...]]):
    """Whole numbers of at least ``minimum`` with commas between: ``1,4,16``. The value is a tuple of ints."""

    name = "N,N,..."

    def __init__(self, minimum: int = 1) -> None:
        self.minimum = minimum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < self.minimum:
            self.fail(
                f"{value!r} is not a list of whole numbers of at least {self.minimum}, as in 1,4", param, ctx
            )
        return numbers


class WordList(click.ParamType[tuple[str, ...]]):
    """Words with commas between, each one of ``choices`` if given. The value is a tuple of strings."""

    name = "WORD,WORD,..."

    def __init__(self, choices: tuple[str, ...] = ()) -> None:
        self.choices = choices

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in str(value).split(",") if word.strip())
        for word in words:
            if self.choices and word not in self.choices:
                self.fail(f"{word!r} is not one of {', '.join(self.choices)}", param, ctx)
        if not words:
            self.fail("an empty list", param, ctx)
        return words


def common_options(function: Decorated) -> Decorated:
    """``--debug``, accepted after the command's name as well as before it."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Print a traceback with an error.")(
        function
    )


def json_option(function: Decorated) -> Decorated:
    """``--json``: the result as JSON on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def quiet_option(function: Decorated) -> Decorated:
    """``--quiet``: no progress on stderr."""
    return click.option("-q", "--quiet", is_flag=True, help="Show no progress.")(function)


def resume_option(function: Decorated) -> Decorated:
    """``--resume``: go on with an interrupted run."""
    return click.option(
        "--resume", is_flag=True, help="Go on with an interrupted run's files; leave them if this one is."
    )(function)


def weight_format_options(function: Decorated) -> Decorated:
    """``--dtype`` and ``--kv-dtype``: formats of weights and cache that costs are counted for."""
    weights = click.option(
        "--dtype",
        metavar="FORMAT",
        help="Weights as float32, bfloat16, float8, int8, int4 or mxfp4.  [default: as published]",
    )
    cache = click.option(
        "--kv-dtype",
        type=click.Choice(("float32", "bfloat16", "float16", "float8")),
        help="Number format of the cache.  [default: bfloat16; float32 beside float32 weights]",
    )
    return weights(cache(function))


def trust_remote_code_option(function: Decorated) -> Decorated:
    """``--trust-remote-code``: run Python code that lies in the source folder."""
    return click.option("--trust-remote-code", is_flag=True, help="Run model code that lies in SOURCE.")(
        function
    )


def read_text(name: str) -> str:
    """The UTF-8 text in the file ``name``, or on stdin for ``-``.

    Raises:
        UsageError: no such file, or not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{'stdin' if name == '-' else name}: not UTF-8 text: {error}") from error
