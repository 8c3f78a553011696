"""Names of values: each once in a graph, and those that moe-export gives are never taken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

RESERVED = re.compile(r"moe\.")
"""How the names begin that moe-export gives to values of MoE layers."""


def nth_call(name: str, number: int) -> str:
    """Name of an MoE layer's ``number``-th run in one forward of the model."""
    return name if number == 1 else f"{name}#{number}"


def named_values(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """Every named value of the main graph: inputs, results of nodes, initializers that are no inputs."""
    inputs = {id(v) for v in model.graph.inputs}
    for value in model.graph.inputs:
        if value.name is not None:
            yield value.name, value
    for node in model.graph:
        for value in node.outputs:
            if value.name:
                yield value.name, value
    for name, value in model.graph.initializers.items():
        if id(value) not in inputs:
            yield name, value


def duplicate_names(model: ir.Model) -> list[str]:
    """Names that more than one value of the main graph has, sorted."""
    counts = Counter(name for name, _ in named_values(model))
    return sorted(name for name, count in counts.items() if count > 1)


def rename(model: ir.Model, value: ir.Value, name: str) -> None:
    """Give ``value`` a name that is free, also where it is an initializer."""
    old = value.name
    if value.is_initializer() and old is not None and model.graph.initializers.get(old) is value:
        del model.graph.initializers[old]
        value.name = name
        model.graph.register_initializer(value)
    else:
        value.name = name


def move_aside(model: ir.Model, name: str, keep: ir.Value | None = None) -> None:
    """Rename every value but ``keep`` that is called ``name``."""
    others = [v for n, v in named_values(model) if n == name and v is not keep]
    taken = {n for n, _ in named_values(model)} if others else set()
    for other in others:
        number = 2
        while (free := f"{name}.{number}") in taken:
            number += 1
        taken.add(free)
        rename(model, other, free)


def free_reserved_names(model: ir.Model) -> None:
    """Rename what the source model itself calls ``moe.…`` (a parameter ``weights`` of ``self.moe[0]``).

    Raises:
        ExportError: an input or output has such a name; they keep theirs.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name is not None and RESERVED.match(value.name):
            raise ExportError(
                f"{value.name!r} is the name of an input or output of the model, and names that begin with "
                "'moe.' are "
                "those of MoE layers in an engine; give it another name"
            )
    taken = {name for name, _ in named_values(model)}
    for name, value in [(n, v) for n, v in named_values(model) if RESERVED.match(n)]:
        free = f"source.{name}"
        while free in taken:
            free = f"source.{free}"
        taken.add(free)
        rename(model, value, free)
