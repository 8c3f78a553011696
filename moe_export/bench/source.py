"""Where the baselines get the source model from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import runs_code
from ..schema import Manifest


@dataclass(frozen=True)
class BaselineSource:
    """``path``: what a worker loads; ``module``: a live module that only exists in this process; both None:
    no source, for the ``reason`` given. ``hash``: what the loaded source must hash to, where that can be
    compared."""

    label: str
    path: str | None = None
    module: Any = None
    hash: str | None = None
    reason: str = ""
    layers: int | None = None
    """Take so many of its layers only, as the bundle has no more; None: all."""


def find_source(manifest: Manifest, source: Any, folder: Path) -> BaselineSource:
    """What to load for ``source`` (None: where the manifest says the model came from).

    A live transformers model is written to ``folder``, so that it runs in processes of its own like any
    other.

    Raises:
        UsageError: ``source`` is of a type no model comes in.
    """
    layers = manifest.source.layers
    if source is None:
        path = manifest.source.path
        if path is None:
            return BaselineSource("", reason="the bundle was built from a live model; give the source")
        if runs_code(path):
            reason = f"code that a manifest names is not run unasked; give it yourself with --source {path}"
            return BaselineSource(path, reason=reason)
        if not _exists(path):
            return BaselineSource(
                path, reason=f"the source is no longer at {path}; give its place with --source"
            )
        return BaselineSource(path, path, hash=manifest.source.hash, layers=layers)
    if isinstance(source, (str, Path)):
        path = str(source)
        if not _exists(path):
            return BaselineSource(path, reason=f"no source at {path}")
        return BaselineSource(path, path, hash=manifest.source.hash, layers=layers)
    name = type(source).__name__
    if hasattr(source, "save_pretrained") and hasattr(source, "config"):
        source.save_pretrained(folder)
        return BaselineSource(f"a live {name}", str(folder), layers=layers)
    if hasattr(source, "state_dict") and callable(source):
        return BaselineSource(f"a live {name}", module=source)
    raise UsageError(f"source: expected a folder, file.py:function or an nn.Module, got {name}")


def _exists(path: str) -> bool:
    return Path(path.rpartition(":")[0] if runs_code(path) else path).exists()
