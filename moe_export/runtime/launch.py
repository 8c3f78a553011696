"""How this process was started: alone, or as one of several ranks by an MPI launcher (``mpiexec``)."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_export.errors import UsageError

TIMEOUT_VARIABLE = "MOE_EXPORT_EP_TIMEOUT"
DEFAULT_TIMEOUT = 60.0
"""Seconds that a rank waits for another one before it ends all of them."""

_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
"""Of MPICH's launcher and all that speak its protocol (Intel MPI, Slurm), and of Open MPI's."""
_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDRA_", "HYDI_", "PRTE_", "I_MPI_")


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1
    local: int = 1
    """How many of them are on this host."""


def launched() -> Launch:
    """What the launcher said; one process of one where there was none."""
    for rank, size, local in _VARIABLES:
        try:
            number, count = int(os.environ[rank]), int(os.environ[size])
            return Launch(number, count, int(os.environ.get(local, count)))
        except (KeyError, ValueError):
            continue
    return Launch()


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that is no rank."""
    return {name: value for name, value in environment.items() if not name.startswith(_PREFIXES)}


def ending(error: BaseException) -> str:
    """What ended a rank, in words."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return "it was told to end"
    return str(error) or type(error).__name__


def timeout_seconds(given: float | None) -> float:
    """The time limit: what was given, else ``MOE_EXPORT_EP_TIMEOUT``, else 60 s.

    Raises:
        UsageError: it is no number above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    name, value = "ep_timeout", DEFAULT_TIMEOUT if given is None else given
    if given is None and text:
        name = TIMEOUT_VARIABLE
        try:
            value = float(text)
        except ValueError:
            value = math.nan
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise UsageError(f"{name} is {given if given is not None else text!r}; expected seconds above 0")
    return float(value)


def mpiexec_command(ranks: int, path: str | os.PathLike[str]) -> str:
    """What to type to run the bundle ``path`` on ``ranks`` ranks: this very command where it is one."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    start = ["mpiexec", "-n", str(ranks)]
    if program == "moe-export":
        return shlex.join([*start, "moe-export", *sys.argv[1:]])
    if program.endswith(".py") and program != "__main__.py":
        return shlex.join([*start, "python", *sys.argv])
    return shlex.join([*start, "moe-export", "run", os.fspath(path)])
