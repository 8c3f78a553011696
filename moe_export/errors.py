"""The one error family of moe-export.

Every error a user can cause is a :class:`MoeExportError`. Its message names the file, field or tensor, says
what was expected, and how to fix it. The command line prints the message without a traceback (``--debug``
shows it) and exits with :attr:`MoeExportError.exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoeExportError(Exception):
    """Base class. ``exit_code`` is what the command line exits with."""

    exit_code = 2


class CheckFailed(MoeExportError):
    """A check ran and failed: parity outside tolerance, a speed-up gate missed. Exit code 1."""

    exit_code = 1


class UsageError(MoeExportError):
    """Wrong use: bad argument, bad configuration, bad input file. Exit code 2."""

    exit_code = 2


class SourceError(UsageError):
    """The source model cannot be read or is damaged (missing shard, NaN weight, unknown family...)."""


class UnsupportedModelError(SourceError):
    """The source model was read, and moe-export refuses it for a stated reason."""


class ExportError(UsageError):
    """The model could not be exported without changing what it computes."""


class BuildError(ExportError):
    """A target's own builder (TensorRT) refused the lowered model or died; the message has its last words."""


class BundleError(UsageError):
    """A bundle is damaged, of a newer schema, or does not fit this machine."""


class InputError(UsageError):
    """Inputs given to an engine do not fit it (shape, dtype, range, limits)."""


class EnvironmentLacksError(MoeExportError):
    """This machine lacks something the command needs; the message says how to get it. Exit code 3."""

    exit_code = 3


def choices_text(name: str, known: Iterable[str]) -> str:
    """Text for an unknown ``name``: the nearest names first, then every choice."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    return f"{nearest}choices: {', '.join(names)}"
