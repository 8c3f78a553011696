"""Times one MoE layer on this CPU: the plugin against everything else that computes it.

    python tools/bench_moe_layer.py --shape A --tokens 1,64 --rounds 5 --json FILE

All contestants live in one process, get the same weights and inputs, and take turns within each round, so
that what disturbs the machine disturbs all of them alike: read the ratios. A turn in which other processes
took cores away is tried again. A contestant's time counts only when its output agrees with the float64
reference. Every round also measures how fast this machine reads memory and multiplies large float32 matrices;
the table says how much of that the plugin reaches.

The JSON is a list of rows: shape, tokens, routing, contestant, dtype, threads, median_ms, low_ms, high_ms
(quartiles over the rounds), ratio_to_best_other: the median of the best other contestant over this one's
(above 1: faster than all others; the plugin's two weight layouts do not count as each other's others), and
foreign_cores: how many cores other processes used meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from moe_layer import SHAPES, Inputs, Layer
from moe_layer_contestants import ALL, Contestants, LeftOut, Run, as_array, is_plugin

from moe_export.bench.machine import NOISY_CORES, LoadMeter, usable_cores

ROUTINGS = ("uniform", "zipf", "one-hot")
DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Largest error over max(1, largest value of the reference)."""
MIN_SECONDS = 0.02
"""A contestant's turn lasts at least this long, after one call that does not count."""
PAUSE_SECONDS = 0.1
"""Between turns: the threads of the last contestant spin for a while before they sleep."""
QUIET_SWITCHES = 60.0
"""Involuntary context switches per second up to which a turn counts as undisturbed."""
TRIES = 10
SLOW_SECONDS = 20.0
"""A contestant whose second call takes longer is left out."""
READ_BYTES = 512 * 2**20
SGEMM_SIZE = 1536


@dataclass(frozen=True)
class Row:
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
    foreign_cores: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    import torch

    torch.set_num_threads(options.threads)
    peaks = Peaks()
    rows: list[Row] = []
    for name in options.shape:
        dtype = options.dtype or ("bfloat16" if name == "C" else "float32")
        print(f"shape {name}: {SHAPES[name]}, {dtype}, {options.threads} threads", flush=True)
        layer = Layer(SHAPES[name], dtype)
        with tempfile.TemporaryDirectory(prefix="moe_layer_", dir=options.folder) as folder:
            contestants = Contestants(layer, options.threads, Path(folder))
            for routing in options.routing:
                for tokens in options.tokens:
                    rows += measure(layer, contestants, tokens, routing, options, peaks)
    if options.json:
        Path(options.json).write_text(
            json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8"
        )
    return 0


def measure(
    layer: Layer,
    contestants: Contestants,
    tokens: int,
    routing: str,
    options: argparse.Namespace,
    peaks: Peaks,
) -> list[Row]:
    """One table: every contestant at one number of tokens and one routing."""
    inputs = layer.inputs(tokens, routing)
    names = [*options.contestants, *(["dense"] if routing == "one-hot" else [])]
    print(f"\nshape {layer.shape.name}, {tokens} tokens, {routing} routing, {inputs.active} experts active")
    runs: dict[str, Run] = {}
    for name in names:
        try:
            runs[name] = _checked(name, contestants.make(name, inputs), inputs, layer.dtype)
        except LeftOut as reason:
            print(f"  {name}: left out: {reason}", flush=True)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    _wait_for_quiet(options.wait)
    meter = LoadMeter(lambda: [os.getpid()])
    peaks.begin()
    for turn in range(options.rounds):
        peaks.measure()
        for name in order[turn % max(len(order), 1) :] + order[: turn % max(len(order), 1)]:
            samples[name].append(_turn(runs[name], meter))
    rows = _rows(samples, layer, tokens, routing, options.threads, meter.foreign_cores)
    _print_table(rows, layer, inputs, peaks)
    return rows


def _wait_for_quiet(limit: float) -> None:
    """Return when other processes have left the cores alone for a moment, or after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        meter = LoadMeter(lambda: [os.getpid()])
        window = meter.start()
        time.sleep(1.0)
        meter.stop(window)
        if (meter.foreign_cores or 0.0) < NOISY_CORES / 2:
            return


def _checked(name: str, run: Run, inputs: Inputs, dtype: str) -> Run:
    """The contestant, after one call whose result was compared with the reference.

    Raises:
        LeftOut: too slow. SystemExit: a wrong result, which must not have a time.
    """
    got = as_array(run())[inputs.checked]
    limit = TOLERANCE[dtype] * max(1.0, float(np.abs(inputs.expected).max()))
    error = float(np.abs(got - inputs.expected).max())
    if not error <= limit:
        raise SystemExit(f"{name}: wrong result, largest error {error:.3g}, allowed {limit:.3g}")
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    if seconds > SLOW_SECONDS:
        raise LeftOut(f"one call takes {seconds:.0f} s")
    return run


def _turn(run: Run, meter: LoadMeter | None = None) -> float:
    """Median seconds of the calls of one turn, of the first turn that other processes hardly disturbed.

    Where none of :data:`TRIES` turns was quiet, the least disturbed one. ``meter`` watches the turns.
    """
    best = (float("inf"), float("inf"))
    time.sleep(PAUSE_SECONDS)
    window = meter.start() if meter is not None else None
    for _ in range(TRIES):
        run()
        times: list[float] = []
        before = _switches()
        while sum(times) < MIN_SECONDS:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        best = min(best, ((_switches() - before) / sum(times), statistics.median(times)))
        if best[0] <= QUIET_SWITCHES:
            break
    if meter is not None:
        meter.stop(window)
    return best[1]


def _switches() -> int:
    """How often the system took a core away from this process's threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Peaks:
    """How fast this machine reads memory (GB/s) and multiplies float32 matrices (GFLOP/s), with all threads.

    Reading: torch's sum over an array far larger than the caches. Multiplying: the better of torch's (MKL or
    oneDNN) and NumPy's (OpenBLAS) product of large square matrices.
    """

    def __init__(self) -> None:
        import torch

        self._data = torch.ones(READ_BYTES // 4)
        a = torch.randn(SGEMM_SIZE, SGEMM_SIZE)
        self._products = [lambda: torch.mm(a, a), lambda: np.matmul(a.numpy(), a.numpy())]
        self.begin()

    def begin(self) -> None:
        self._reads: list[float] = []
        self._multiplies: list[list[float]] = [[] for _ in self._products]

    def measure(self) -> None:
        self._reads.append(READ_BYTES / _turn(self._data.sum) / 1e9)
        for product, rates in zip(self._products, self._multiplies, strict=True):
            rates.append(2 * SGEMM_SIZE**3 / _turn(product) / 1e9)

    @property
    def read(self) -> float:
        return statistics.median(self._reads)

    @property
    def sgemm(self) -> float:
        return max(statistics.median(rates) for rates in self._multiplies)


def _rows(
    samples: dict[str, list[float]],
    layer: Layer,
    tokens: int,
    routing: str,
    threads: int,
    foreign_cores: float | None,
) -> list[Row]:
    median = {name: statistics.median(times) for name, times in samples.items()}
    rows = []
    for name, times in samples.items():
        others = [
            value
            for other, value in median.items()
            if other not in (name, "dense") and not (is_plugin(name) and is_plugin(other))
        ]
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        rows.append(
            Row(
                layer.shape.name,
                tokens,
                routing,
                name,
                layer.dtype,
                threads,
                round(median[name] * 1e3, 4),
                round(low * 1e3, 4),
                round(high * 1e3, 4),
                round(min(others) / median[name], 3) if others else None,
                foreign_cores,
            )
        )
    return rows


def _print_table(rows: list[Row], layer: Layer, inputs: Inputs, peaks: Peaks) -> None:
    nbytes = inputs.active * layer.shape.expert_bytes(layer.itemsize)
    flops = layer.shape.flops(inputs.ids.size)
    titles = f"{'median ms':>10}{'quartiles':>19}{'vs best other':>15}{'GB/s':>8}{'GFLOP/s':>9}"
    print(f"  {'contestant':<18}{titles}")
    for row in sorted(rows, key=lambda r: r.median_ms):
        ratio = "" if row.ratio_to_best_other is None else f"{row.ratio_to_best_other:.2f}"
        seconds = row.median_ms / 1e3
        spread = f"{row.low_ms:.2f} - {row.high_ms:.2f}"
        print(
            f"  {row.contestant:<18}{row.median_ms:>10.3f}{spread:>19}{ratio:>15}"
            f"{nbytes / seconds / 1e9:>8.1f}{flops / seconds / 1e9:>9.1f}"
        )
    print(f"  this machine meanwhile: reads {peaks.read:.1f} GB/s, SGEMM {peaks.sgemm:.0f} GFLOP/s")
    if rows and rows[0].foreign_cores is not None:
        noisy = ": too much, repeat this" if rows[0].foreign_cores > NOISY_CORES else ""
        print(f"  other processes used {rows[0].foreign_cores:.2f} cores{noisy}")
    for row in rows:
        if is_plugin(row.contestant):
            seconds = row.median_ms / 1e3
            print(
                f"  {row.contestant} reaches {nbytes / seconds / 1e9 / peaks.read:.0%} of the bandwidth, "
                f"{flops / seconds / 1e9 / peaks.sgemm:.0%} of SGEMM"
            )
    sys.stdout.flush()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(choices: Sequence[str]) -> Any:
        def split(text: str) -> list[str]:
            values = text.split(",")
            for value in values:
                if value not in choices:
                    raise argparse.ArgumentTypeError(f"{value!r}: expected some of {', '.join(choices)}")
            return values

        return split

    def numbers(text: str) -> list[int]:
        values = [int(part) for part in text.split(",")]
        if min(values) < 1:
            raise argparse.ArgumentTypeError("expected positive numbers")
        return values

    parser.add_argument("--shape", type=several(list(SHAPES)), default=["A"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=numbers, default=[1, 8, 64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--routing", type=several(ROUTINGS), default=["uniform"])
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, bfloat16 for shape C")
    parser.add_argument("--contestants", type=several(ALL), default=list(ALL))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine at most")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--folder", default=os.environ.get("TMPDIR"), help="for the ONNX models")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads: expected 1 or more")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
