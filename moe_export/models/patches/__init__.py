"""Per-family patches: exact, reversible rewrites of model code that cannot be traced as it is, one file per family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PATCHES: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {}
"""Family name → context manager that patches while the model is traced."""


@contextmanager
def family_patches(family: str | None, model: nn.Module) -> Iterator[None]:
    """Activate the family's patch, if it has one."""
    if family is None or family not in PATCHES:
        yield
        return
    with PATCHES[family](model):
        yield
