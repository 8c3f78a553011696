"""What every format of a package has."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from moe_export.errors import UsageError

if TYPE_CHECKING:
    from moe_export.bundle import Bundle

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class PackageOptions:
    """What a package is asked to be.

    ``name``: the model's name on the server; None: the bundle's folder. ``server_path``: where the server
    will see the package. ``gpus``: ids of the GPUs that it runs on. ``sm``: which of a bundle's plans, where
    a package holds those of one SM only.

    Raises:
        UsageError: a value that cannot be; the message names it.
    """

    name: str | None = None
    server_path: str = "/models"
    gpus: tuple[int, ...] | None = None
    sm: int | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)
        path = self.server_path
        if not path.startswith("/") or not path.isprintable() or ".." in PurePosixPath(path).parts:
            raise UsageError(
                "server_path: expected an absolute path on the server without '..', as in /models, got "
                f"{path!r}"
            )
        if self.gpus is not None:
            if not self.gpus or any(type(n) is not int or n < 0 for n in self.gpus):
                raise UsageError(f"gpus: expected ids of GPUs, as in 0,1, got {list(self.gpus)}")
            if len(set(self.gpus)) != len(self.gpus):
                raise UsageError(f"gpus: {','.join(map(str, self.gpus))} names a GPU twice")


def check_name(name: str) -> str:
    """``name``, when a server takes it as a model's.

    Raises:
        UsageError: it does not.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"name: {name!r} is no name of a model: letters, digits, '.', '_' and '-', at most 128, the "
            "first "
            "a letter or a digit; give one with --name"
        )
    return name


@dataclass(frozen=True)
class Package:
    """What was written.

    ``model``: its name on the server. ``backend``: what the server runs it with. ``notes``: what whoever
    serves it must know, a line each.
    """

    path: Path
    format: str
    model: str
    backend: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a format will write: files of the bundle under their new names, and texts.

    ``files``: path in the package → path of an existing file. ``links``: path in the package → what the
    symbolic link there points to. All paths have forward slashes.
    """

    model: str
    backend: str
    files: dict[str, Path]
    texts: dict[str, str]
    links: dict[str, str]
    notes: tuple[str, ...]


class PackageFormat(ABC):
    """One format."""

    name: str
    summary: str

    @abstractmethod
    def plan(self, bundle: Bundle, options: PackageOptions) -> Plan:
        """What a package of the checked ``bundle`` holds.

        Raises:
            UsageError: this bundle or these options do not fit the format; the message says what to do.
            EnvironmentLacksError: something is missing on this machine.
        """
