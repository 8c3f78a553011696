"""What torch.export says when it refuses a model, in the words of the model's inputs."""

from __future__ import annotations

import re

from ..errors import ExportError
from ..schema import ModelIO

_VIOLATED = re.compile(r"Constraints violated \(([^)]*)\)")
_CONSTANT = re.compile(r"You marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_GUARD = re.compile(r"Not all values of (\S+) = .* satisfy the generated guard (.*?)\.?$", re.MULTILINE)
_READ = re.compile(r"SympifyError: <function (\w+) at")
_SIZE = re.compile(r"L\['\w+'\](?:\[\d+\])+\.size\(\)\[\d+\]")

FIX = (
    "The model's code branches on this size or reads it as a Python number; rewrite it with tensor "
    "operations, or leave "
    "the axis out of the dynamic ones, so that the engine takes this size only"
)


def dimension_name(name: str) -> str:
    """Name of a dimension as torch.export takes it (an identifier)."""
    return name.replace(".", "_")


def places(io: ModelIO, dimension: str) -> str:
    """Where ``dimension`` occurs in the inputs: ``frames, axis 1 ('sequence')``."""
    found = [
        f"{spec.name}, axis {axis} ({size!r})"
        for spec in io.inputs
        for axis, size in enumerate(spec.shape)
        if isinstance(size, str) and dimension in (size, dimension_name(size))
    ]
    return found[0] if found else repr(dimension)


def frozen(where: str, size: int | str) -> str:
    """Message for a dimension that became the sample's size."""
    return (
        f"{where} was frozen to the sample's size {size} while tracing: the exported graph would be wrong at "
        "any "
        f"other size. {FIX}"
    )


def refused(error: BaseException, io: ModelIO, subject: str) -> ExportError:
    """The :class:`ExportError` for what ``torch.export`` raised while tracing ``subject``."""
    text = str(error)
    if constant := _CONSTANT.search(text):
        return ExportError(frozen(places(io, constant[1]), constant[2]))
    if violated := _VIOLATED.search(text):
        where = " and ".join(places(io, d.strip()) for d in violated[1].split(","))
        guard = _GUARD.search(text)
        rule = f" It would hold only where {_readable(guard[2])}." if guard else ""
        return ExportError(
            f"{where} cannot stay dynamic: the traced graph would be wrong at some sizes.{rule} {FIX}"
        )
    if read := _READ.search(text):  # torch's own conversion of a sum of sizes to a number fails
        return ExportError(f"{places(io, read[1])}: the model's code reads this size as a number. {FIX}")
    if "data-dependent" in text:
        return ExportError(
            f"{subject}: torch.export cannot trace the model: its code decides by the values of a tensor "
            f"({first_line(error)}). Use torch.where or masks instead of if, .item() and loops over found "
            "indices; for "
            "the experts of an MoE block write an adapter (docs/own-modules.md)"
        )
    return ExportError(f"{subject}: torch.export cannot trace the model: {first_line(error)}")


def _readable(guard: str) -> str:
    return _SIZE.sub("size", guard).replace(" and size <= IntInfinity()", "")


def first_line(error: BaseException) -> str:
    """Type and first line of the error that began the chain."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:500]
