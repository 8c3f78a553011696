"""A user's own nn.Module as a source: live, or made by a function in a Python file."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoeExportError, SourceError, UsageError, choices_text
from ..schema import SourceInfo
from .identity import own_module_hash

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .sources import LoadedSource

FORM = (
    "expected (module, inputs, dynamic): inputs maps input names to sample tensors, dynamic maps input names "
    "to "
    "{axis: dimension name}; or a transformers model alone"
)


def call_factory(file: Path, function: str) -> tuple[nn.Module, dict[str, Any], dict[str, dict[int, str]]]:
    """Import ``file`` and call its ``function``: the module, its sample inputs, their dynamic axes (both
    empty for a transformers model).

    Raises:
        SourceError: no such file or function, its code fails, or it returns something else.
    """
    from torch import nn

    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    name = f"_moe_export_source_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SourceError(f"{file}: Python cannot import it")
    python = importlib.util.module_from_spec(spec)
    sys.modules[name] = python
    sys.path.insert(0, str(file.resolve().parent))
    try:
        try:
            spec.loader.exec_module(python)
        except MoeExportError:
            raise
        except Exception as error:  # the user's own code
            del sys.modules[name]
            raise SourceError(f"{file}: cannot be imported: {_told(error)}") from error
        factory = getattr(python, function, None)
        if not callable(factory):
            known = [
                n
                for n, v in vars(python).items()
                if callable(v) and not n.startswith("_") and getattr(v, "__module__", None) == name
            ]
            raise SourceError(f"{file}: no function {function!r}; {choices_text(function, known)}")
        try:
            made = factory()
        except MoeExportError:
            raise
        except Exception as error:  # the user's own code
            raise SourceError(f"{file}:{function} fails: {_told(error)}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    if isinstance(made, nn.Module):
        return made, {}, {}
    if not (
        isinstance(made, tuple)
        and len(made) == 3
        and isinstance(made[0], nn.Module)
        and isinstance(made[1], Mapping)
        and isinstance(made[2], Mapping)
    ):
        kinds = f" of {', '.join(type(m).__name__ for m in made)}" if isinstance(made, tuple) else ""
        raise SourceError(f"{file}:{function} returns {type(made).__name__}{kinds}; {FORM}")
    return made[0], dict(made[1]), {k: dict(v) for k, v in made[2].items()}


def _told(error: Exception) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    line = (
        f" ({Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno})"
        if frame is not None
        else ""
    )
    return f"{type(error).__name__}: {error}{line}"


def module_source(
    module: nn.Module,
    path: str | None,
    inputs: Mapping[str, torch.Tensor] | None,
    dynamic: Mapping[str, Mapping[int, str]] | None,
    task: str | None,
) -> LoadedSource:
    """A loaded source for a user's own module.

    Raises:
        UsageError: inputs or dynamic axes do not fit. SourceError: a weight is NaN or infinite.
    """
    from .sources import LoadedSource, as_float32, check_finite_state

    if task not in (None, "module"):
        raise UsageError(f"task {task!r} needs a transformers model; an own nn.Module is task 'module'")
    checked = _inputs(inputs)
    axes = _dynamic(checked, dynamic or {})
    module = as_float32(module)
    check_finite_state(module)
    cls = type(module).__name__
    info = SourceInfo("module", path, cls, cls, own_module_hash(module, checked, axes))
    return LoadedSource(module, "module", "module", info, None, checked, axes)


def _inputs(inputs: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    import torch

    if not inputs:
        raise UsageError("an own nn.Module needs sample inputs: inputs={name: tensor}")
    for name, tensor in inputs.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"inputs: {name!r} is not the name of an argument of forward")
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"inputs[{name!r}]: expected a tensor, got {type(tensor).__name__}")
    return {name: tensor.detach().cpu() for name, tensor in inputs.items()}


def _dynamic(
    inputs: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[int, str]]:
    sizes: dict[str, tuple[int, str]] = {}
    for name, axes in dynamic.items():
        if name not in inputs:
            raise UsageError(f"dynamic: {name!r} is not an input; {choices_text(str(name), inputs)}")
        shape = inputs[name].shape
        if not isinstance(axes, Mapping):
            raise UsageError(
                f"dynamic[{name!r}]: expected {{axis: dimension name}}, got {type(axes).__name__}"
            )
        for axis, dimension in axes.items():
            where = f"dynamic[{name!r}]: axis {axis!r}"
            if type(axis) is not int or not 0 <= axis < len(shape):
                raise UsageError(f"{where} of a tensor with {len(shape)} axes (they count from 0)")
            if not isinstance(dimension, str) or not dimension.isidentifier():
                raise UsageError(f"{where}: expected a name like 'batch', got {dimension!r}")
            size = int(shape[axis])
            if size < 2:
                raise UsageError(
                    f"{where} ({dimension!r}) has size {size} in the sample; torch.export takes a size of 0 "
                    "or 1 for a "
                    "fixed one, so give a sample of 2 or more there (the engine takes 1 all the same)"
                )
            if dimension in sizes and sizes[dimension][0] != size:
                other_size, other = sizes[dimension]
                raise UsageError(
                    f"{where}: dimension {dimension!r} has size {size} here and {other_size} in {other}; "
                    "different "
                    "sizes need different names"
                )
            sizes.setdefault(dimension, (size, f"dynamic[{name!r}] axis {axis}"))
    return {name: dict(axes) for name, axes in dynamic.items()}
