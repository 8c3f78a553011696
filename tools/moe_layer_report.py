"""What the layer benchmark found: rows, their ratios, tables for reading and for the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_layer import Inputs, Shape
from moe_layer_contestants import dtype_of, is_plugin

from moe_export.bench.machine import NOISY_CORES
from moe_export.ops.quantization import BLOCK, KINDS

BITS = {"float32": 32, "bfloat16": 16, **KINDS}


@dataclass(frozen=True)
class Entry:
    """A contestant under one condition: what takes its turn in a round."""

    contestant: str
    layer_dtype: str
    threads: int
    routing: str

    @property
    def dtype(self) -> str:
        return dtype_of(self.contestant, self.layer_dtype)


@dataclass(frozen=True)
class Row:
    """One entry's time. Ratios: the other's time over this one's. ``bandwidth`` and ``sgemm``: shares of what
    the machine did in the same run, by all threads (None for entries with fewer)."""

    shape: str
    tokens: int
    routing: str
    contestant: str
    dtype: str
    threads: int
    median_ms: float
    low_ms: float
    high_ms: float
    ratio_to_best_other: float | None
    ratio_to_eager: float | None
    ratio_to_dense: float | None
    ratio_to_float32: float | None
    ratio_to_one_thread: float | None
    bandwidth: float | None
    sgemm: float | None
    foreign_cores: float | None


def make_rows(
    samples: Mapping[Entry, Sequence[float]],
    shape: Shape,
    inputs: Mapping[str, Inputs],
    peaks: tuple[float, float],
    foreign_cores: float | None,
) -> list[Row]:
    """One row per entry; ``samples`` in seconds, ``inputs`` by routing, ``peaks``: see Peaks.snapshot."""
    median = {entry: statistics.median(times) for entry, times in samples.items()}
    most = max((entry.threads for entry in median), default=0)
    rows = []
    for entry, times in samples.items():
        given, seconds = inputs[entry.routing], median[entry]
        low, high = _quartiles(times)
        others = [t for other, t in median.items() if _rivals(entry, other)]

        def ratio(seconds: float = seconds, entry: Entry = entry, **changed: Any) -> float | None:
            other = replace(entry, **changed)
            return round(median[other] / seconds, 3) if other in median and other != entry else None

        # A block of quantised weights has a scale of float32.
        bits = BITS[entry.dtype] + (32 / BLOCK if entry.dtype in KINDS else 0)
        nbytes = given.active * shape.expert_bytes(1) * bits / 8
        alone = entry.threads == most
        rows.append(
            Row(
                shape.name,
                len(given.hidden),
                entry.routing,
                entry.contestant,
                entry.dtype,
                entry.threads,
                round(seconds * 1e3, 4),
                round(low * 1e3, 4),
                round(high * 1e3, 4),
                round(min(others) / seconds, 3) if others else None,
                1.0 if entry.contestant == "eager" else ratio(contestant="eager"),
                ratio(contestant="dense"),
                ratio(layer_dtype="float32"),
                ratio(threads=1),
                round(nbytes / seconds / 1e9 / peaks[0], 3) if alone else None,
                round(shape.flops(given.ids.size) / seconds / 1e9 / peaks[1], 3) if alone else None,
                foreign_cores,
            )
        )
    return rows


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def _rivals(entry: Entry, other: Entry) -> bool:
    """Whether ``other`` counts for ``entry``'s ratio: another library under the same conditions."""
    same = (entry.dtype, entry.threads, entry.routing) == (other.dtype, other.threads, other.routing)
    names = (entry.contestant, other.contestant)
    own = names[0] == names[1] or all(is_plugin(name) for name in names)
    return same and not own and other.contestant != "dense"


def print_table(rows: Sequence[Row], peaks: tuple[float, float]) -> None:
    """All rows of one shape and number of tokens."""
    titles = f"{'median ms':>10}{'quartiles':>19}{'vs best other':>15}{'vs eager':>10}{'of bandwidth':>14}"
    print(f"  {'contestant':<18}{'dtype':<10}{'threads':>7}  {'routing':<9}{titles}{'of SGEMM':>10}")
    for row in sorted(rows, key=lambda r: r.median_ms):
        spread = f"{row.low_ms:.2f} - {row.high_ms:.2f}"
        print(
            f"  {row.contestant:<18}{row.dtype:<10}{row.threads:>7}  {row.routing:<9}{row.median_ms:>10.3f}"
            f"{spread:>19}{_number(row.ratio_to_best_other):>15}{_number(row.ratio_to_eager):>10}"
            f"{_percent(row.bandwidth):>14}{_percent(row.sgemm):>10}"
        )
    print(f"  this machine meanwhile: reads {peaks[0]:.1f} GB/s, SGEMM {peaks[1]:.0f} GFLOP/s")
    if rows and rows[0].foreign_cores is not None:
        noisy = ": too much, repeat this" if rows[0].foreign_cores > NOISY_CORES else ""
        print(f"  other processes used {rows[0].foreign_cores:.2f} cores{noisy}", flush=True)


def markdown(rows: Sequence[Row]) -> str:
    """One table: a line per contestant and condition (those that differ), a column per shape and tokens, and
    lines for what the plugin reaches."""
    columns = list(dict.fromkeys((r.shape, r.tokens) for r in rows))
    fields = [f for f in ("dtype", "threads", "routing") if len({getattr(r, f) for r in rows}) > 1]
    lines = [
        "| " + " | ".join(["contestant", *fields, *(f"{s} {t}" for s, t in columns)]) + " |",
        "|---" * (1 + len(fields) + len(columns)) + "|",
    ]
    groups: dict[tuple[str, ...], dict[tuple[str, int], Row]] = {}
    for row in rows:
        key = (row.contestant, *(str(getattr(row, f)) for f in fields))
        groups.setdefault(key, {})[row.shape, row.tokens] = row

    def line(names: Sequence[str], cells: Sequence[str]) -> None:
        lines.append("| " + " | ".join([*names, *cells]) + " |")

    for key, found in groups.items():
        line(key, [_milliseconds(found[c].median_ms) if c in found else "–" for c in columns])
    measures = (
        ("against the best other", "ratio_to_best_other", _number),
        ("against eager", "ratio_to_eager", _number),
        ("against dense", "ratio_to_dense", _number),
        ("against float32", "ratio_to_float32", _number),
        ("against one thread", "ratio_to_one_thread", _number),
        ("of the bandwidth", "bandwidth", _percent),
        ("of SGEMM", "sgemm", _percent),
    )
    for key, found in groups.items():
        if not is_plugin(key[0]) or key[0] == "plugin-unpacked":
            continue
        for text, field, show in measures:
            values = [getattr(found[c], field) if c in found else None for c in columns]
            if any(v is not None for v in values):
                line((f"**{key[0]}** {text}", *key[1:]), [show(v) or "–" for v in values])
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
