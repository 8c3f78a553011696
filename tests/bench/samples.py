"""A benchmark report with chosen numbers, and runners written in plain Python."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from moe_export.bench.machine import Machine
from moe_export.bench.result import BenchReport, Contestant, Row, Sanity, Skipped, make_ratios
from moe_export.bench.runner import NotPossible, Runner

NAMES = ("engine", "pytorch-eager", "torch-compile", "transformers-onnx", "transformers-onnx-fused")


def row(contestant: str, phase: str, ms: float, *, sequence: int = 128, routing: str = "real") -> Row:
    """A row whose percentiles spread around ``ms``."""
    imbalance = {"real": 1.7, "uniform": 1.0, "zipf": 2.4, "one-hot": 4.0}[routing]
    return Row(
        contestant=contestant,
        phase=phase,
        batch=1,
        sequence=sequence,
        routing=routing,
        samples=20,
        p50_ms=ms,
        p95_ms=ms * 1.2,
        p99_ms=ms * 1.3,
        mean_ms=ms * 1.02,
        min_ms=ms * 0.9,
        tokens_per_s=1000.0 / ms,
        imbalance=None if phase == "decode" else imbalance,
        foreign_cores=0.1,
        noisy=False,
    )


def make_bench(**changes: Any) -> BenchReport:
    """Five contestants; the fused export is the fastest alternative, torch.compile has wrong numbers."""
    times = dict(zip(NAMES, (10.0, 20.0, 5.0, 14.0, 12.0), strict=True))
    rows = [
        row(name, phase, ms * scale, sequence=sequence)
        for phase, scale, sequence in (("prefill", 1.0, 128), ("prefill", 4.0, 512), ("decode", 0.1, 128))
        for name, ms in times.items()
    ]
    for routing, ms in (("uniform", 11.0), ("zipf", 10.5), ("one-hot", 8.0)):
        rows += [
            row("engine", "prefill", ms * 4, sequence=512, routing=routing),
            row("pytorch-eager", "prefill", ms * 8, sequence=512, routing=routing),
        ]
    contestants = [
        Contestant(
            name, f"the {name}", Sanity(True, 1e-6, 1e-3), load_s=0.5, first_run_s=0.1, peak_rss=1 << 27
        )
        for name in NAMES
    ]
    wrong = Sanity(False, 2.5, 1e-3, "largest error 2.5 against eager, allowed 0.001")
    contestants[2] = dataclasses.replace(contestants[2], sanity=wrong)
    values: dict[str, Any] = {
        "bundle": "demo",
        "source": "somewhere/model",
        "source_hash": "ab" * 32,
        "task": "text-generation",
        "target": "onnxruntime",
        "dtype": "float32",
        "machine": Machine("A CPU", "x86_64", "Linux", 2, 4, 4, 2, 1 << 34, foreign_cores=0.1),
        "settings": {"rounds": 5, "threads": 2},
        "order": NAMES,
        "contestants": tuple(contestants),
        "rows": tuple(rows),
        "ratios": make_ratios(tuple(rows), frozenset({"torch-compile"})),
        "skipped": (Skipped("transformers-onnx", "its routing cannot be replaced", "prefill 1x512 zipf"),),
        "notes": ("inputs are text",),
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 12.5,
    }
    return BenchReport(**{**values, **changes})


class CountingRunner(Runner):
    """Logits that depend on the tokens; writes its name into ``log`` at every measured request."""

    def __init__(self, name: str, log: list[str], *, factor: float = 1.0, wrong_from: int = 1 << 30) -> None:
        """``factor`` scales its logits; runs of ``wrong_from`` tokens or more give another result."""
        self.name, self.log, self.factor, self.wrong_from = name, log, factor, wrong_from
        self.ids = np.zeros((1, 0), np.int64)
        self.forced: list[Any] | None = None

    def load(self) -> dict[str, Any]:
        return {"seconds": 0.25, "notes": [f"{self.name} is ready"]}

    def prefill(self, ids: Any) -> Any:
        self.log.append(f"{self.name} prefill")
        self.ids = ids
        return self._logits(ids)

    def step(self, ids: Any) -> Any:
        self.log.append(f"{self.name} step")
        self.ids = np.concatenate([self.ids, ids], axis=1)
        return self._logits(self.ids)[:, -1:]

    def _logits(self, ids: Any) -> Any:
        time.sleep(0.0005)
        late = 1.0 if ids.shape[1] >= self.wrong_from else 0.0
        level = np.cumsum(ids % 7, axis=1)[..., None].astype(np.float32)
        return self.factor * (level / 7 + np.arange(5, dtype=np.float32)) + late

    def force(self, routing: list[Any] | None) -> None:
        self.forced = routing


class ShyRunner(CountingRunner):
    """Cannot load."""

    def load(self) -> dict[str, Any]:
        raise NotPossible("it does not want to")


class FragileRunner(CountingRunner):
    """Loads and passes the check, and breaks in runs of ten tokens or more."""

    def prefill(self, ids: Any) -> Any:
        if ids.shape[1] >= 10:
            raise RuntimeError("out of breath\nsecond line")
        return super().prefill(ids)


class NaNRunner(CountingRunner):
    """Gives NaN."""

    def _logits(self, ids: Any) -> Any:
        return super()._logits(ids) * np.nan
