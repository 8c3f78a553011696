"""What a benchmark found, as plain data: written into bundles, read by reports and by CI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CheckFailed, UsageError
from ..schema import from_json, to_json
from .machine import Machine
from .stats import geometric_mean

BENCH_SCHEMA_VERSION = 1
ENGINE = "engine"
EAGER = "pytorch-eager"
AGAINST = ("eager", "best")
CLEARLY_SLOWER = 0.95
"""Below this ratio the engine is called slower; between this and 1 it is a draw."""


@dataclass(frozen=True)
class Sanity:
    """How far a contestant's logits are from PyTorch eager's on the same tokens, prefill and decode.

    ``ok`` None: not judged, for the reason in ``note``. A baseline with ``ok`` False computes something else
    ("wrong numbers") and never counts as the best alternative.
    """

    ok: bool | None
    max_error: float | None = None
    tolerance: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Contestant:
    """One way to run the model. Times in seconds, memory in bytes.

    ``prepare_s``: one-time work before loading (an export). ``load_s``: from files to ready.
    ``first_run_s``: the first run, with its one-time cost (a compiler, allocations). ``peak_rss``: the
    largest resident size of its own process, libraries included; None where it shared the caller's process.
    """

    name: str
    title: str
    sanity: Sanity
    load_s: float
    prepare_s: float | None = None
    first_run_s: float | None = None
    peak_rss: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One contestant on one workload.

    ``phase``: ``prefill`` (from an empty cache to the logits of all tokens), ``decode`` (one token after
    ``sequence`` cached ones) or ``forward`` (a model without cache). ``tokens_per_s`` counts the batch.
    ``imbalance``: load of the busiest expert over the mean load, mean over layers; None where it was not
    read. ``foreign_cores``: what other processes used meanwhile; ``noisy``: that was too much.
    """

    contestant: str
    phase: str
    batch: int
    sequence: int
    routing: str
    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    tokens_per_s: float
    imbalance: float | None = None
    foreign_cores: float | None = None
    noisy: bool = False


@dataclass(frozen=True)
class Ratio:
    """Speed-ups of the engine on one workload: the other's median time over the engine's.

    ``best``: the fastest alternative with right numbers (PyTorch eager included).
    """

    phase: str
    batch: int
    sequence: int
    routing: str
    engine_ms: float
    vs_eager: float | None
    best: str | None
    vs_best: float | None
    noisy: bool = False


@dataclass(frozen=True)
class Skipped:
    """Something that was asked for and not measured. ``workload`` empty: the contestant as a whole."""

    contestant: str
    reason: str
    workload: str = ""


@dataclass(frozen=True)
class BenchReport:
    """Result of :func:`moe_export.bench.bench_bundle`. ``order``: the order of the contestants in every
    round."""

    bundle: str
    source: str
    source_hash: str
    task: str
    target: str
    dtype: str
    machine: Machine
    settings: dict[str, Any]
    order: tuple[str, ...]
    contestants: tuple[Contestant, ...]
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    created: str = ""
    seconds: float = 0.0
    schema_version: int = BENCH_SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with :meth:`summary` beside the fields."""
        data: dict[str, Any] = to_json(self)
        data["summary"] = self.summary()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BenchReport:
        """Rebuild a report from :meth:`to_dict`.

        Raises:
            UsageError: another schema version, or a missing, unknown or wrong field (named).
        """
        if not isinstance(data, dict):
            raise UsageError(f"benchmark report: expected an object, got {type(data).__name__}")
        values = {k: v for k, v in data.items() if k != "summary"}
        version = values.get("schema_version")
        if version != BENCH_SCHEMA_VERSION:
            raise UsageError(
                f"benchmark report: schema version {version!r} where this moe-export reads "
                f"{BENCH_SCHEMA_VERSION}; run the benchmark again"
            )
        try:
            report: BenchReport = from_json(cls, values, "benchmark report")
        except ValueError as error:
            raise UsageError(str(error)) from error
        return report

    def contestant(self, name: str) -> Contestant:
        """The contestant called ``name``.

        Raises:
            KeyError: it did not run.
        """
        return {c.name: c for c in self.contestants}[name]

    def speedup(self, phase: str | None = None, against: str = "eager") -> float | None:
        """Geometric mean of the speed-ups with the model's own routing; None where nothing was compared."""
        return geometric_mean(
            value for r in self._real_ratios(phase) if (value := _against(r, against)) is not None
        )

    def summary(self) -> dict[str, Any]:
        """The few numbers a manifest or a headline shows; the model's own routing only."""
        phases = sorted({r.phase for r in self.ratios})
        return {
            "vs_eager": {p: _rounded(self.speedup(p, "eager")) for p in phases},
            "vs_best": {p: _rounded(self.speedup(p, "best")) for p in phases},
            "slower": self.slower(),
            "workloads": len(self._real_ratios(None)),
            "threads": self.machine.threads,
            "noisy": self.machine.noisy or any(r.noisy for r in self.rows),
            "wrong_numbers": [c.name for c in self.contestants if c.sanity.ok is False],
            "skipped": sorted({s.contestant for s in self.skipped if not s.workload}),
        }

    def slower(self) -> list[str]:
        """Workloads with the model's own routing where another contestant is clearly faster, in words."""
        return [
            f"{workload_text(r)}: {r.vs_best:.2f}x against {r.best}"
            for r in self._real_ratios(None)
            if r.vs_best is not None and r.vs_best < CLEARLY_SLOWER
        ]

    def require_speedup(self, minimum: float, against: str = "eager") -> None:
        """The gate for CI: every workload with the model's own routing must be at least ``minimum`` times
        faster.

        Raises:
            CheckFailed: a workload is slower, the engine's numbers are wrong, or there is nothing to compare
                with.
            UsageError: ``against`` is neither ``eager`` nor ``best``.
        """
        if against not in AGAINST:
            raise UsageError(f"against: expected one of {', '.join(AGAINST)}, got {against!r}")
        for contestant in self.contestants:
            if contestant.name == ENGINE and contestant.sanity.ok is False:
                raise CheckFailed(
                    f"the engine's numbers are wrong, so its speed means nothing: {contestant.sanity.note}"
                )
        found = [(r, value) for r in self._real_ratios(None) if (value := _against(r, against)) is not None]
        if not found:
            reasons = (
                "; ".join(f"{s.contestant}: {s.reason}" for s in self.skipped) or "no baseline was asked for"
            )
            raise CheckFailed(f"no speed-up against {against} could be measured ({reasons})")
        slow = [(r, v) for r, v in found if v < minimum]
        if slow:
            texts = ", ".join(
                f"{workload_text(r)} {v:.2f}x" for r, v in sorted(slow, key=lambda item: item[1])
            )
            noise = (
                " (other processes were busy during the measurement: repeat it)"
                if any(r.noisy for r, _ in slow)
                else ""
            )
            raise CheckFailed(f"the speed-up against {against} is below {minimum:g}x: {texts}{noise}")

    def _real_ratios(self, phase: str | None) -> list[Ratio]:
        return [r for r in self.ratios if r.routing == "real" and phase in (None, r.phase)]


def make_ratios(rows: tuple[Row, ...], wrong: frozenset[str]) -> tuple[Ratio, ...]:
    """Speed-ups per workload, in the order of the rows. ``wrong``: contestants that never are the best."""
    groups: dict[tuple[str, int, int, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.phase, row.batch, row.sequence, row.routing), {})[row.contestant] = row
    ratios = []
    for key, group in groups.items():
        mine = group.get(ENGINE)
        if mine is None:
            continue
        others = {n: r for n, r in group.items() if n != ENGINE and n not in wrong}
        best = min(others.values(), key=lambda r: r.p50_ms, default=None)
        eager = group.get(EAGER)
        ratios.append(Ratio(
            *key,
            engine_ms=mine.p50_ms,
            vs_eager=eager.p50_ms / mine.p50_ms if eager else None,
            best=best.contestant if best else None,
            vs_best=best.p50_ms / mine.p50_ms if best else None,
            noisy=any(r.noisy for r in group.values()),
        ))  # fmt: skip
    return tuple(ratios)


def workload_text(item: Row | Ratio) -> str:
    """``prefill 1x512``, ``decode 4x128``, with the routing where it is not the model's own."""
    routing = "" if item.routing == "real" else f" {item.routing}"
    return f"{item.phase} {item.batch}x{item.sequence}{routing}"


def _against(ratio: Ratio, against: str) -> float | None:
    return ratio.vs_eager if against == "eager" else ratio.vs_best


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
