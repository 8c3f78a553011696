"""Targets: each builds what it runs from the portable model."""

from __future__ import annotations

from ..errors import UsageError, choices_text
from .base import Backend
from .onnxruntime.build import OnnxRuntimeBackend
from .portable import PortableBackend
from .tensorrt import BACKEND as TENSORRT
from .tensorrt_rtx import BACKEND as TENSORRT_RTX

BACKENDS: dict[str, Backend] = {
    b.name: b for b in (OnnxRuntimeBackend(), PortableBackend(), TENSORRT_RTX, TENSORRT)
}
"""Every target by name."""


def get_backend(target: str) -> Backend:
    """The backend of ``target``.

    Raises:
        UsageError: no such target; the message lists the choices.
    """
    if target not in BACKENDS:
        raise UsageError(f"unknown target {target!r}; {choices_text(target, BACKENDS)}")
    return BACKENDS[target]
