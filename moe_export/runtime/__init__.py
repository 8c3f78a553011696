"""Running a bundle: sessions, generation, runs that show the routing, ranks. Needs no torch and no
transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_export.runtime.launch import Launch, launched
    from moe_export.runtime.serving import serve_rank
    from moe_export.runtime.session import Session, load

__all__ = ["Launch", "Session", "launched", "load", "serve_rank"]

_HOMES = {
    "Launch": "launch",
    "Session": "session",
    "launched": "launch",
    "load": "session",
    "serve_rank": "serving",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
