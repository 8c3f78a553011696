"""What the registry knows about one MoE family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_export.schema import TASKS

Status = Literal["works", "limited", "refused"]
STATUSES: tuple[str, ...] = ("works", "limited", "refused")
FP32_TOLERANCE = 1e-5
"""Largest fp32 error allowed, relative to ``max(1, |reference|max)``; fp32 against fp64 is itself 2-4e-6."""


@dataclass(frozen=True)
class Family:
    """One MoE family of transformers.

    Attributes:
        name: the folder in ``transformers/models``.
        routing: how tokens choose experts.
        model_class: the class of transformers that is exported (the text decoder of a multimodal family).
        tiny: configuration values of the small random model that the tests export; its routing features are
            switched on (groups, selection biases, windows, dropped tokens).
        reason: the stated limit of a limited family, or why a family is refused; empty when it works.
        scope: which part of the family is meant, when it is not the whole.
        also: further classes of the family that the tests export, with the same ``tiny``.
        left_padding: whether transformers' own code gives a padded row what the row alone gives; where
            it does not, there is nothing to compare with.
        cached_reference: decoding is compared with transformers' own cached run, not with one run over the
            whole sequence, because the family's code gives different results for the two.
        tolerance: relative to ``max(1, |reference|max)``; one above :data:`FP32_TOLERANCE` states why in
            ``tolerance_reason``.
    """

    name: str
    status: Status
    routing: str
    model_class: str = ""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("text-generation", "feature-extraction")
    reason: str = ""
    scope: str = ""
    also: tuple[str, ...] = ()
    left_padding: bool = True
    cached_reference: bool = False
    tolerance: float = FP32_TOLERANCE
    tolerance_reason: str = ""

    def __post_init__(self) -> None:
        where = f"family {self.name!r}"
        if not self.name.isidentifier():
            raise ValueError(f"{where}: name must be a folder of transformers/models")
        if self.status not in STATUSES:
            raise ValueError(f"{where}: status must be one of {STATUSES}, got {self.status!r}")
        if not self.routing:
            raise ValueError(f"{where}: routing must say how tokens choose experts")
        if (self.status == "works") == bool(self.reason):
            raise ValueError(f"{where}: status {self.status!r} with reason {self.reason!r}; "
                             "a family states a reason exactly when it is limited or refused")
        if self.status != "refused" and not (self.model_class and self.tiny):
            raise ValueError(f"{where}: a family that is not refused needs model_class and tiny")
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"{where}: unknown task {unknown[0]!r}; choices: {', '.join(TASKS)}")
        above = self.tolerance > FP32_TOLERANCE
        if self.tolerance < FP32_TOLERANCE or above != bool(self.tolerance_reason):
            raise ValueError(f"{where}: tolerance {self.tolerance} with reason {self.tolerance_reason!r}; "
                             f"it is at least {FP32_TOLERANCE} and has a reason exactly when it is above")

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class of the family that is exported in tests."""
        return (self.model_class, *self.also) if self.status != "refused" else ()
