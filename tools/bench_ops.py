"""Times each small op of the CPU plugin against its own ONNX body in ONNX Runtime: no kernel may be slower.

    python tools/bench_ops.py --op Router,Combine --tokens 1,64,2048 --rounds 9 --json FILE --markdown

Kernel and body get the same inputs, as ONNX Runtime's own values, and take turns; their outputs are
compared first. A turn in which other processes took cores away is tried again. Routers are those of five
sizes: (8, 2), (16, 2), (64, 8), (128, 8) as softmax over all experts, renormalised, and (256, 8) as
DeepSeek-V3's: sigmoid, bias, 4 of 8 groups. Dispatch, GroupedMatMul (inner 256, columns 128) and Combine
(H 1024) get the same experts; ExpertSlots, RankLoad, RankDispatch and RankCombine have them on 8 ranks.

The JSON is a list of rows: op, experts, top_k, tokens, threads, kernel_ms, body_ms (medians over the rounds),
ratio: body over kernel, above 1 where the kernel is faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_arguments import new_file, number, numbers, several, write_rows
from moe_layer_peaks import turn_seconds
from numpy.typing import NDArray

from moe_export.backends.onnxruntime.plugin import cpu_plugin_path, cpu_plugin_problem
from moe_export.bench.machine import usable_cores
from moe_export.graph.functions import attach_functions
from moe_export.ops import DOMAIN, OPS, VERSION

Array = NDArray[Any]
OPSET = 22
RANKED = ("ExpertSlots", "RankLoad", "RankDispatch", "RankCombine")
KNOWN = ("Router", "Dispatch", "GroupedMatMul", "Combine", *RANKED)
SIZES = ((8, 2), (16, 2), (64, 8), (128, 8), (256, 8))
"""Experts, experts per token."""
HIDDEN = 1024
RANKS = 8
INNER, COLUMNS = 256, 128
MIN_SECONDS = 0.005
"""A turn lasts at least this long, after one call that does not count."""
PAUSE_SECONDS = 0.002
GROUPED = {
    "score": "sigmoid",
    "renormalize": 1,
    "epsilon": 1e-20,
    "scale": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "group_score": "top2_sum",
    "biased": 1,
}
"""DeepSeek-V3's router, for 256 experts."""


@dataclass(frozen=True)
class Row:
    op: str
    experts: int
    top_k: int
    tokens: int
    threads: int
    kernel_ms: float
    body_ms: float
    ratio: float


@dataclass(frozen=True)
class Case:
    """One op with its attributes and inputs (``tokens`` of them change)."""

    op: str
    attributes: Mapping[str, Any]
    inputs: Mapping[str, Array]


def make_case(op: str, experts: int, top_k: int, tokens: int) -> Case:
    """Random inputs of the size; Dispatch, GroupedMatMul and Combine get a random routing."""
    rng = np.random.default_rng([experts, tokens])
    if op == "Router":
        attributes = {"top_k": top_k, **(GROUPED if experts == 256 else {"renormalize": 1})}
        inputs = {"logits": rng.standard_normal((tokens, experts), np.float32)}
        if attributes.get("biased"):
            inputs["selection_bias"] = rng.standard_normal(experts, np.float32) * np.float32(0.1)
        return Case(op, attributes, inputs)
    ids = rng.random((tokens, experts)).argsort(axis=1)[:, :top_k].astype(np.int32)
    if op == "Dispatch":
        return Case(op, {"num_experts": experts}, {"expert_ids": ids})
    if op in RANKED:
        return _ranked_case(op, ids, experts, rng)
    order, offsets, _ = OPS["Dispatch"].reference(ids, experts)
    if op == "Combine":
        weights = rng.random((tokens, top_k), np.float32)
        rows = rng.standard_normal((ids.size, HIDDEN), np.float32)
        return Case(op, {}, {"rows": rows, "order": order, "weights": weights})
    rows = rng.standard_normal((ids.size, INNER), np.float32)
    weight = rng.standard_normal((experts, COLUMNS, INNER), np.float32) / np.float32(INNER**0.5)
    return Case(op, {"transposed": 0}, {"rows": rows, "weight": weight, "offsets": offsets})


def _ranked_case(op: str, ids: Array, experts: int, rng: np.random.Generator) -> Case:
    """Expert e in slot e; blocks as large as they must be."""
    if op == "ExpertSlots":
        table = np.arange(experts, dtype=np.int32)[:, None]
        return Case(op, {}, {"expert_ids": ids, "table": table})
    attributes = {"ranks": RANKS, "slots_per_rank": experts // RANKS}
    if op == "RankLoad":
        return Case(op, attributes, {"slots": ids})
    inputs = {
        "hidden": rng.standard_normal((len(ids), HIDDEN), np.float32),
        "slots": ids,
        "weights": rng.random(ids.shape, np.float32),
        "capacity": OPS["RankLoad"].reference(ids, **attributes),
    }
    if op == "RankDispatch":
        return Case(op, attributes, inputs)
    rows, _, places = OPS["RankDispatch"].reference(**inputs, **attributes)
    return Case(op, {}, {"rows": rows.astype(np.float32), "places": places})


def make_session(case: Case, threads: int, library: Path | None) -> Any:
    """A session of the one node: by the kernels in ``library``, or, without one, by the op's body."""
    import onnx_ir as ir
    import onnxruntime as ort

    contract = OPS[case.op]
    given = {
        p.name: ir.Value(
            name=p.name,
            type=ir.TensorType(ir.DataType.from_numpy(case.inputs[p.name].dtype)),
            shape=ir.Shape([f"{p.name}_{axis}" for axis in range(len(p.shape))]),
        )
        for p in contract.inputs
        if p.name in case.inputs
    }
    # A weight is a constant, as in an engine.
    if "weight" in given:
        given["weight"].const_value = ir.tensor(case.inputs["weight"], name="weight")
    node = ir.node(
        case.op,
        [given.get(p.name) for p in contract.inputs],
        attributes=contract.complete(case.attributes),
        domain=DOMAIN,
        num_outputs=len(contract.outputs),
    )
    for value, p in zip(node.outputs, contract.outputs, strict=True):
        value.name = p.name
        kind = {"float32": ir.DataType.FLOAT}.get(p.dtypes[0]) or ir.DataType[p.dtypes[0].upper()]
        value.type = ir.TensorType(kind)
        value.shape = ir.Shape([f"{p.name}_{axis}" for axis in range(len(p.shape))])
    graph = ir.Graph(
        [v for v in given.values() if v.const_value is None],
        list(node.outputs),
        nodes=[node],
        initializers=[v for v in given.values() if v.const_value is not None],
        name=case.op,
        opset_imports={"": OPSET, DOMAIN: VERSION},
    )
    model = ir.Model(graph, ir_version=10)
    attach_functions(model, OPSET)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def measure(op: str, experts: int, top_k: int, options: argparse.Namespace, library: Path) -> list[Row]:
    """Kernel and body at every number of tokens.

    Raises:
        SystemExit: their outputs differ, so their times would mean nothing.
    """
    import onnxruntime as ort

    cases = {tokens: make_case(op, experts, top_k, tokens) for tokens in options.tokens}
    sessions = [make_session(next(iter(cases.values())), options.threads, lib) for lib in (library, None)]
    rows = []
    for tokens, case in cases.items():
        given = {name: array for name, array in case.inputs.items() if name != "weight"}
        feed = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
        runs = [partial(session.run_with_ort_values, None, feed) for session in sessions]
        _compare(case, *[[value.numpy() for value in run()] for run in runs])
        samples: list[list[float]] = [[], []]
        for turn in range(options.rounds):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                samples[which].append(
                    turn_seconds(runs[which], options.tries, least=MIN_SECONDS, pause=PAUSE_SECONDS)
                )
        kernel, body = (statistics.median(times) * 1e3 for times in samples)
        rows.append(
            Row(
                op,
                experts,
                top_k,
                tokens,
                options.threads,
                round(kernel, 5),
                round(body, 5),
                round(body / kernel, 2),
            )
        )
    return rows


def _compare(case: Case, kernel: list[Array], body: list[Array]) -> None:
    tolerance = OPS[case.op].tolerance.get("float32")
    for p, got, want in zip(OPS[case.op].outputs, kernel, body, strict=True):
        if got.dtype.kind == "f" and tolerance is not None:
            # Both may be off by the tolerance.
            limit = 2 * tolerance.max * max(1.0, float(np.abs(want).max(initial=0.0)))
            same = bool((np.abs(got - want) <= limit).all())
        else:
            same = np.array_equal(got, want)
        if not same:
            raise SystemExit(f"{case.op}: kernel and body differ in output {p.name}")


def markdown(rows: Sequence[Row]) -> str:
    """Ratios body / kernel: a line per op and size, a column per number of tokens."""
    tokens = sorted({r.tokens for r in rows})
    lines = [
        "| op | E | K | " + " | ".join(f"T {t}" for t in tokens) + " |",
        "|---" * (3 + len(tokens)) + "|",
    ]
    for op, experts, top_k in dict.fromkeys((r.op, r.experts, r.top_k) for r in rows):
        ratios = {r.tokens: r.ratio for r in rows if (r.op, r.experts, r.top_k) == (op, experts, top_k)}
        cells = " | ".join(f"{ratios[t]:.2f}" for t in tokens)
        lines.append(f"| `{op}` | {experts} | {top_k} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    library = cpu_plugin_path()
    if library is None:
        print(cpu_plugin_problem(), file=sys.stderr)
        return 2
    rows: list[Row] = []
    for op in options.op:
        for experts, top_k in SIZES:
            for row in measure(op, experts, top_k, options, library):
                rows.append(row)
                if not options.markdown:
                    print(
                        f"{op:<14} E {experts:>3} K {top_k} T {row.tokens:>5}: "
                        f"kernel {row.kernel_ms:>9.4f} ms, body {row.body_ms:>9.4f} ms, {row.ratio:.2f}",
                        flush=True,
                    )
    if options.markdown:
        print(markdown(rows))
    slower = [r for r in rows if r.ratio < 1]
    for row in slower:
        print(f"slower than its body: {row}", file=sys.stderr)
    write_rows(rows, options.json)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", type=several(KNOWN), default=list(KNOWN), help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--tokens", type=numbers, default=[1, 8, 64, 512, 2048])
    parser.add_argument("--rounds", type=number, default=9)
    parser.add_argument("--threads", type=number, default=usable_cores())
    parser.add_argument(
        "--tries", type=number, default=10, help="how often a disturbed turn is taken at most"
    )
    parser.add_argument("--json", type=new_file, help="write the rows to this file")
    parser.add_argument("--markdown", action="store_true", help="print one Markdown table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
