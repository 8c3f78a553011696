"""Reads what ``moe-export trace --json FILE`` counted: how often tokens choose each expert."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_export.errors import UsageError

_WANTED = "expected the JSON that moe-export trace --json FILE writes"


@dataclass(frozen=True)
class LoadTrace:
    """What ``tokens`` tokens chose: per MoE layer ``counts`` [E], and ``dropped`` that no expert took."""

    file: str
    tokens: int
    counts: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]

    def check_model(self, layers: Sequence[tuple[int, int]], model: str) -> None:
        """The trace is of a model with these MoE layers: experts and experts per token of each.

        Raises:
            UsageError: it is not.
        """
        if len(self.counts) != len(layers):
            raise UsageError(
                f"{self.file}: the trace of another model: it has {len(self.counts)} MoE layers, {model} has "
                f"{len(layers)}"
            )
        for index, (counts, dropped) in enumerate(zip(self.counts, self.dropped, strict=True)):
            experts, top_k = layers[index]
            chosen = sum(counts) + dropped
            if len(counts) != experts or chosen != self.tokens * top_k:
                raise UsageError(
                    f"{self.file}: the trace of another model: layer {index} chose "
                    f"{chosen / self.tokens:.3g} of {len(counts)} experts per token, {model} chooses {top_k} "
                    f"of {experts}"
                )


def read_load_trace(path: Path) -> LoadTrace:
    """The trace in the file ``path``.

    Raises:
        UsageError: no such file, or no trace; the message says what is missing.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("layers"), list):
        raise UsageError(f"{path}: no list 'layers'; {_WANTED}")
    tokens = values.get("tokens")
    if type(tokens) is not int or tokens < 1:
        raise UsageError(f"{path}: 'tokens' is {tokens!r}; {_WANTED}")
    counts, dropped = [], []
    for index, layer in enumerate(values["layers"]):
        found = layer.get("counts") if isinstance(layer, dict) else None
        if not isinstance(found, list) or not found or not all(type(c) is int and c >= 0 for c in found):
            raise UsageError(f"{path}: layer {index} has no list 'counts' of whole numbers; {_WANTED}")
        lost = layer.get("dropped", 0)
        if type(lost) is not int or lost < 0:
            raise UsageError(f"{path}: layer {index}: 'dropped' is {lost!r}; {_WANTED}")
        counts.append(tuple(found))
        dropped.append(lost)
    return LoadTrace(str(path), tokens, tuple(counts), tuple(dropped))
