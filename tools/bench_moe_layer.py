"""Times one MoE layer on this CPU: the plugin against everything else that computes it.

    python tools/bench_moe_layer.py --shape A --tokens 1,64 --rounds 5 --json FILE
    python tools/bench_moe_layer.py --topic threads          (a table for docs/cpu-plugin.md)

All contestants live in one process, get the same weights and inputs, and take turns within each round, so
that what disturbs the machine disturbs all of them alike: read the ratios. Several dtypes, numbers of threads
and routings take turns in the same rounds, too. A turn in which other processes took cores away is tried
again. A contestant's time counts only when its output agrees with the float64 reference, within the limits of
its dtype (moe_layer_contestants.py, TOLERANCES); one that cannot run, fails or is wrong is left out with a
line, and the last two make the exit code 1. Every round also measures how fast this machine reads memory and
multiplies large float32 matrices; the tables say how much of that each contestant reaches.

The JSON is a list of rows: shape, tokens, routing, contestant, dtype, threads, median_ms, low_ms, high_ms
(quartiles over the rounds), ratio_to_best_other: the median of the best other contestant of the same dtype,
threads and routing over this one's (above 1: faster than all others; the plugin's two weight layouts do not
count as each other's others), ratio_to_eager (quantised ones: against float32), ratio_to_dense (one-hot
routing), ratio_to_float32 (of bfloat16) and ratio_to_one_thread: the other's time over this one's, bandwidth
and sgemm: shares of what the machine did meanwhile, and foreign_cores: how many cores other processes used.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_arguments import existing_folder, new_file, number, numbers, several, write_rows
from moe_layer import DTYPES, SHAPES, Inputs, Layer, LeftOut, Run
from moe_layer_contestants import ALL, FLOAT, Contestants, problem
from moe_layer_onnxruntime import QUANTIZED
from moe_layer_peaks import Peaks, own_load, turn_seconds, wait_for_quiet
from moe_layer_report import Entry, Row, make_rows, markdown, print_table

from moe_export.bench.machine import usable_cores

ROUTINGS = ("uniform", "zipf", "one-hot")
SLOW_SECONDS = 20.0
"""A contestant whose second call takes longer is left out."""
_PLUGIN = "plugin-packed,plugin-unpacked"
TOPICS = {
    "float32": "--shape A,B --tokens 1,8,64,512,2048 --rounds 5",
    "mixtral": "--shape C --tokens 1,8,64,512 --rounds 2",
    "quantized": "--shape A,B --tokens 1,8,64,512 --rounds 7 --contestants eager,plugin-packed,"
    + ",".join(QUANTIZED),
    "bfloat16": "--shape A,B --tokens 1,8,64,512 --rounds 7 --dtypes float32,bfloat16 "
    f"--contestants {_PLUGIN}",
    "threads": f"--shape A,B --tokens 1,8,64,512 --rounds 7 --threads 1,2 --contestants {_PLUGIN}",
    "skew": "--shape A --tokens 64,512 --rounds 7 --routing uniform,zipf,one-hot "
    f"--contestants eager,grouped_mm,onnxruntime-moe,{_PLUGIN}",
}
"""What a table of docs/cpu-plugin.md is measured with."""


class Failure(Exception):
    """A contestant that should have taken part: it failed, or its result is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    peaks = Peaks(max(options.threads), options.tries)
    rows: list[Row] = []
    failures = 0
    for name in options.shape:
        dtypes = options.dtypes or (["bfloat16"] if name == "C" else ["float32"])
        print(f"shape {name}: {SHAPES[name]}, {', '.join(dtypes)}", flush=True)
        with tempfile.TemporaryDirectory(prefix="moe_layer_", dir=options.folder) as folder:
            layers = {}
            for dtype in dtypes:
                layer = Layer(SHAPES[name], dtype)
                place = Path(folder) / dtype
                place.mkdir()
                layers[dtype] = (layer, Contestants(layer, place, options.ggml))
            for tokens in options.tokens:
                found, failed = measure(layers, tokens, options, peaks)
                rows += found
                failures += failed
            del layer, layers
            gc.collect()
    if options.markdown:
        print("\n" + markdown(rows))
    write_rows(rows, options.json)
    return 1 if failures else 0


def measure(
    layers: Mapping[str, tuple[Layer, Contestants]], tokens: int, options: argparse.Namespace, peaks: Peaks
) -> tuple[list[Row], int]:
    """One table: every entry at one number of tokens. Also how many contestants failed."""
    shape = next(iter(layers.values()))[0].shape
    runs: dict[Entry, Run] = {}
    inputs: dict[str, Inputs] = {}
    failures = 0
    for dtype, (layer, contestants) in layers.items():
        for routing in options.routing:
            given = layer.inputs(tokens, routing)
            inputs[routing] = given
            print(f"\nshape {shape.name}, {tokens} tokens, {routing}, {dtype}: {given.active} experts active")
            names = [*options.contestants, *(["dense"] if routing == "one-hot" else [])]
            for entry in [Entry(n, dtype, t, routing) for t in options.threads for n in names]:
                try:
                    runs[entry] = checked(entry, contestants, given)
                except LeftOut as reason:
                    print(f"  {entry.contestant}, {entry.threads} threads: left out: {reason}", flush=True)
                except Failure as reason:
                    failures += 1
                    print(f"  {entry.contestant}, {entry.threads} threads: FAILED: {reason}", flush=True)
                else:
                    if entry.contestant == "openvino":
                        print(f"  openvino, {entry.threads} threads: {contestants.openvino.note}", flush=True)
    samples: dict[Entry, list[float]] = {entry: [] for entry in runs}
    order = list(runs)
    wait_for_quiet(options.wait)
    meter = own_load()
    peaks.begin()
    for turn in range(options.rounds):
        peaks.measure()
        first = turn * 5 % max(len(order), 1)
        for entry in order[first:] + order[:first]:
            _set_threads(entry.threads)
            samples[entry].append(turn_seconds(runs[entry], options.tries, meter))
    machine = peaks.snapshot()
    rows = make_rows(samples, shape, inputs, machine, meter.foreign_cores)
    print_table(rows, machine)
    return rows, failures


def checked(entry: Entry, contestants: Contestants, inputs: Inputs) -> Run:
    """The contestant, after a call whose result was compared with the reference.

    Raises:
        LeftOut: it cannot take part, or is too slow. Failure: it failed, or its result is wrong.
    """
    _set_threads(entry.threads)
    try:
        run = contestants.make(entry.contestant, inputs, entry.threads)
        result = run()
    except LeftOut:
        raise
    except Exception as error:  # foreign software, any kind of error: the others go on without it
        text = " ".join(str(error).split())
        raise Failure(f"{type(error).__name__}: {text[:300]}") from error
    if wrong := problem(result, inputs, entry.dtype):
        raise Failure(f"wrong result: {wrong}")
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    if seconds > SLOW_SECONDS:
        raise LeftOut(f"one call takes {seconds:.0f} s")
    return run


def _set_threads(threads: int) -> None:
    """Of PyTorch; all others are made for a number of threads."""
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(name, **settings)

    add("--topic", choices=tuple(TOPICS), help="the options of a table of docs/cpu-plugin.md, and --markdown")
    add("--shape", type=several(SHAPES), default=["A"], help=f"of {', '.join(SHAPES)}")
    add("--tokens", type=numbers, default=[1, 8, 64, 512, 2048])
    add("--rounds", type=number, default=9)
    add("--routing", type=several(ROUTINGS), default=["uniform"], help=f"of {', '.join(ROUTINGS)}")
    add("--dtypes", type=several(DTYPES), help="default: float32, bfloat16 for shape C")
    add("--contestants", type=several(ALL), default=list(FLOAT), help="default: all that are not quantised")
    add("--threads", type=numbers, default=[usable_cores()])
    add("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine at most")
    add("--tries", type=number, default=10, help="how often a disturbed turn is taken at most")
    add("--ggml", metavar="FOLDER", help="where libggml-base and libggml-cpu lie (or MOE_EXPORT_GGML)")
    add("--markdown", action="store_true", help="print one Markdown table at the end")
    add("--json", type=new_file, help="write the rows to this file")
    add("--folder", type=existing_folder, default=os.environ.get("TMPDIR"), help="for the ONNX models")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.topic:
        # What is given besides wins.
        options = parser.parse_args([*shlex.split(TOPICS[options.topic]), "--markdown", *given])
    return options


if __name__ == "__main__":
    raise SystemExit(main())
