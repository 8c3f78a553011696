"""Commands under ``mpiexec``: rank 0 runs the command, the others serve its engine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from moe_export.errors import UsageError
from moe_export.runtime.launch import DEFAULT_TIMEOUT, TIMEOUT_VARIABLE, launched

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

RANKED_COMMANDS = ("run", "verify", "bench", "trace")
"""Commands that run a bundle of several ranks."""


def _keep(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    if value is not None:
        os.environ[TIMEOUT_VARIABLE] = str(value)
    return value


def ranked_command(path: str) -> Callable[[Decorated], Decorated]:
    """For a command that loads the bundle in its parameter ``path``: under ``mpiexec`` rank 0 runs it, and
    the others serve. Adds ``--ep-timeout``. The command has the parameters ``trust`` and ``threads``."""

    def decorate(function: Decorated) -> Decorated:
        @functools.wraps(function)
        def command(**values: Any) -> Any:
            with _driving(values[path], trust=values["trust"], threads=values["threads"]) as here:
                return function(**values) if here else 0

        option = click.option(
            "--ep-timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", callback=_keep,
            expose_value=False,
            help="How long the ranks of a bundle wait for each other.  "
            f"[default: {TIMEOUT_VARIABLE}, or {DEFAULT_TIMEOUT:g}]",
        )  # fmt: skip
        return cast(Decorated, option(command))

    return decorate


@contextmanager
def _driving(path: str | Path, *, trust: bool, threads: int | None) -> Iterator[bool]:
    """Whether this process goes on with the command. A worker serves first, and then has nothing to do.

    What rank 0 does before it loads the bundle may take long; what ends it there is told to the
    workers.
    """
    if launched().rank:
        from moe_export.runtime.serving import serve_rank

        serve_rank(path, trust=trust, threads=threads)
        yield False
        return
    if launched().size == 1:
        yield True
        return
    from moe_export.runtime.joining import refuse_ranks
    from moe_export.runtime.launch import timeout_seconds
    from moe_export.runtime.ranks import connect

    try:
        # What comes before the bundle is loaded may take long, too.
        with connect(timeout_seconds(None)).alive():
            yield True
    except BaseException as error:
        refuse_ranks(path, error, None)
        raise
    refuse_ranks(path, UsageError("rank 0 did not load the bundle"), None)


def refuse_other_command(name: str) -> str:
    """Why the command ``name`` does not run under ``mpiexec`` with several ranks; empty where it does."""
    size = launched().size
    if size == 1 or name in RANKED_COMMANDS:
        return ""
    return (
        f"`moe-export {name}` runs in one process, and mpiexec started {size} of them; start it without "
        "mpiexec"
    )
