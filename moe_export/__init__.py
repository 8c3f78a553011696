"""Compiler from PyTorch mixture-of-experts models to verified ONNX engines.

``export``, ``build``, ``verify``, ``bench``, ``package`` and ``load`` are what the commands of the same names
call. They and the adapter helpers (``register_moe_block``, ``moe_block``, ``MoEBlockSpec``) are imported on
first use, so that ``import moe_export`` stays fast and needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_export.api import build, export
    from moe_export.bench import bench_bundle as bench
    from moe_export.models.adapters import MoEBlockSpec, moe_block, register_moe_block
    from moe_export.package import package_bundle as package
    from moe_export.runtime.session import load
    from moe_export.verify import verify_bundle as verify

__version__ = "0.1.0"

__all__ = [
    "MoEBlockSpec",
    "__version__",
    "bench",
    "build",
    "export",
    "load",
    "moe_block",
    "package",
    "register_moe_block",
    "verify",
]

_LAZY = {
    "export": "moe_export.api",
    "build": "moe_export.api",
    "load": "moe_export.runtime.session",
    "register_moe_block": "moe_export.models.adapters",
    "moe_block": "moe_export.models.adapters",
    "MoEBlockSpec": "moe_export.models.adapters",
}
_CALLABLE = {"verify": "verify_bundle", "bench": "bench_bundle", "package": "package_bundle"}


class _CallablePackage(ModuleType):
    """``moe_export.verify`` is a package and, when called, its ``verify_bundle``; so are ``bench`` and
    ``package``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = _CALLABLE[self.__name__.rpartition(".")[2]]
        return getattr(self, function)(*args, **kwargs)


class _Package(ModuleType):
    """This package's own class: makes the subpackages above callable when they are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"{__name__}.{name}")
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
