"""The hash of a live model: what decides whether a build of it would make the same bundle again.

Weights alone do not say what a model computes: ``top_k``, an activation or the code may change and the state
dict stay.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_LIBRARIES = ("site-packages", "dist-packages")


def library_model_hash(model: Any) -> str:
    """SHA-256 over class, configuration, generation configuration and state dict of a transformers model."""
    digest = hashlib.sha256()
    configs = [model.config, getattr(model, "generation_config", None)]
    facts = [type(model).__qualname__, *(None if c is None else _config(c) for c in configs)]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    _add_state(digest, model)
    return digest.hexdigest()


def _config(config: Any) -> dict[str, Any]:
    left_out = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    return {k: v for k, v in config.to_dict().items() if k not in left_out}


def own_module_hash(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, str]]
) -> str:
    """SHA-256 over state dict, plain attributes and source code of a user's module, and the form of its
    inputs.

    Source code: the files of the modules' classes and adapters, and every file of the user's that these
    import.
    """
    digest = hashlib.sha256()
    facts = [
        [[name, str(t.dtype), list(t.shape)] for name, t in inputs.items()],
        [
            [name, sorted((axis, str(d)) for axis, d in axes.items())]
            for name, axes in sorted(dynamic.items())
        ],
        [[name, type(m).__qualname__, _plain_attributes(m)] for name, m in module.named_modules()],
    ]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for file in sorted(_source_files(module)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    _add_state(digest, module)
    return digest.hexdigest()


def _add_state(digest: Any, module: nn.Module) -> None:
    """Names, dtypes, shapes and bytes of parameters and buffers."""
    import torch

    tensors = dict(module.state_dict()) | dict(module.named_buffers())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, texts and lists of them among the module's own attributes, and of functions their names."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if callable(value):
            found[name] = getattr(value, "__qualname__", type(value).__qualname__)
        elif _is_plain(value):
            found[name] = repr(value)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_is_plain(v) for v in (*value, *value.values()))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def _source_files(module: nn.Module) -> set[Path]:
    """Files of the user's Python modules that define the model's classes or are imported by those that do."""
    waiting = {type(m).__module__ for m in module.modules()}
    seen: set[str] = set()
    files: set[Path] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        python = sys.modules.get(name)
        file = getattr(python, "__file__", None)
        if python is None or file is None or not _is_users(Path(file)):
            continue
        files.add(Path(file).resolve())
        waiting |= set(_imported(python))
    return files


def _is_users(file: Path) -> bool:
    """A Python file that is neither installed nor part of Python or of this package."""
    inside = Path(__file__).resolve().parents[1]
    file = file.resolve()
    standard = Path(json.__file__).resolve().parents[1]
    return (
        file.suffix == ".py"
        and file.is_file()
        and not any(part in _LIBRARIES for part in file.parts)
        and not file.is_relative_to(standard)
        and not file.is_relative_to(inside)
    )


def _imported(python: ModuleType) -> Iterator[str]:
    for value in vars(python).values():
        if isinstance(value, ModuleType):
            yield value.__name__
        elif isinstance(origin := getattr(value, "__module__", None), str):
            yield origin
