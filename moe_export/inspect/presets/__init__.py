"""Published models by name: their public configs, sources, and what their publishers say of their size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_export.errors import SourceError, choices_text
from moe_export.inspect.architecture import Architecture
from moe_export.inspect.config_readers import read_architecture

RULES = {
    "all": "every parameter",
    "without_embeddings": "without the input embeddings",
    "without_embeddings_and_head": "without input embeddings and output head",
    "without_embeddings_and_head_with_mtp": "without input embeddings and output head, plus one layer for "
    "multi-token prediction",
    "experts_in_every_layer": "as if every layer had experts",
}
"""Counting rules that published figures follow."""


@dataclass(frozen=True)
class Published:
    """A published parameter count: ``total`` or ``active``, in billions, by one of :data:`RULES`.

    ``step``: how far rounding may move it beyond 1 %, in billions; 0 where it is given exactly enough.
    """

    count: str
    billions: float
    rule: str
    text: str
    source: str
    step: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        if self.count not in ("total", "active") or self.rule not in RULES:
            raise SourceError(
                f"published figure {self.text}: unknown count {self.count!r} or rule {self.rule!r}"
            )

    def ours(self, arch: Architecture) -> float:
        """What this project counts by the same rule, in billions."""
        counts = arch.parameters() if self.count == "total" else arch.active_parameters()
        total = sum(counts.values())
        if self.rule != "all" and self.rule != "experts_in_every_layer":
            total -= counts["embeddings"]
        if self.rule.startswith("without_embeddings_and_head"):
            total -= counts["output_head"]
        sparse = next((layer for layer in reversed(arch.layers) if layer.parameters()["router"]), None)
        if sparse is not None:
            layer = sum(sparse.parameters().values())
            if self.rule.endswith("with_mtp"):
                # The layer, a matrix that joins embedding and state, and three norms.
                total += layer + 2 * arch.hidden**2 + 3 * arch.hidden
            if self.rule == "experts_in_every_layer":
                total = (
                    total - sum(sum(x.parameters().values()) for x in arch.layers) + layer * len(arch.layers)
                )
        return total / 1e9

    def agrees(self, arch: Architecture) -> bool:
        """Whether both counts are within 1 %, or within the published figure's rounding."""
        return abs(self.ours(arch) - self.billions) <= max(0.01 * self.billions, self.step)


@dataclass(frozen=True)
class Preset:
    """One published model. ``weights``: the number format it is published in (see ``costs.formats``)."""

    name: str
    title: str
    aliases: tuple[str, ...]
    source: str
    weights: str
    published: tuple[Published, ...]
    notes: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def architecture(self) -> Architecture:
        """Layers and sizes, from the config."""
        return _architecture(self.name)


def _load(path: Path) -> Preset:
    values = json.loads(path.read_text(encoding="utf-8"))
    return Preset(
        name=values["name"],
        title=values["title"],
        aliases=tuple(values["aliases"]),
        source=values["source"],
        weights=values["weights"],
        published=tuple(Published(**figure) for figure in values["published"]),
        notes=tuple(values["notes"]),
        config=values["config"],
    )


@lru_cache(maxsize=1)
def presets() -> Mapping[str, Preset]:
    """All presets by name, in alphabetical order."""
    loaded = [_load(path) for path in sorted(Path(__file__).parent.glob("*.json"))]
    return {preset.name: preset for preset in sorted(loaded, key=lambda p: p.name)}


@lru_cache(maxsize=64)
def _architecture(name: str) -> Architecture:
    return read_architecture(presets()[name].config, f"preset {name}")


def _plain(name: str) -> str:
    return "-".join(name.lower().replace("_", "-").replace(".", "-").split())


def find_preset(name: str) -> Preset | None:
    """The preset called ``name`` or known by it; case, dots, spaces and underscores do not matter."""
    wanted = _plain(name)
    for preset in presets().values():
        if wanted in {_plain(known) for known in (preset.name, *preset.aliases)}:
            return preset
    return None


def get_preset(name: str) -> Preset:
    """The same, or an error.

    Raises:
        SourceError: there is none; the message names the nearest.
    """
    found = find_preset(name)
    if found is None:
        raise SourceError(f"no preset {name!r}; {choices_text(_plain(name), presets())}")
    return found
