"""How ranks scale on this machine: time per run, and a rank's exchange: time, bytes and the formula's bytes.

    python tools/bench_expert_parallel.py                               the table of docs/expert-parallel.md
    python tools/bench_expert_parallel.py --ranks 1,2 --tokens 1,64 --rounds 3 --json rows.json

A random Mixtral of the given sizes is built for each number of ranks and mode. Per round each contestant runs
in turn, in processes of its own, every rank pinned to a core and with one thread. Exit code 1 when bytes that
were counted differ from the formula's (``moe_export.costs.bytes_sent``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_arguments import existing_folder, new_file, number, numbers, several, write_rows

from moe_export.schema import EP_MODES

RUNS = 5
"""Timed runs per turn, after two that are not."""
VOCABULARY = 512


@dataclass(frozen=True)
class Row:
    """Medians over all turns. ``exchange_ms``: of rank 0, waiting for others included; ``bytes``: what one
    rank gives to the exchanges of a run. ``ratio``: speed over that of one rank in the same rounds."""

    ranks: int
    mode: str
    tokens: int
    median_ms: float
    spread: float
    exchange_ms: float
    bytes: float
    formula_bytes: float
    ratio: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 when bytes differ from the formula's."""
    options = _parse(arguments)
    if options.child is not None:
        return _serve(options)
    contestants = [
        (ranks, mode)
        for ranks, mode in itertools.product(options.ranks, options.mode)
        if ranks > 1 or mode == options.mode[0]
    ]
    with tempfile.TemporaryDirectory(prefix="expert_parallel_", dir=options.folder) as name:
        folder = Path(name)
        _save_source(folder / "source", options)
        for ranks, mode in contestants:
            _build(folder, ranks, mode)
        turns: dict[tuple[int, str], list[dict[str, Any]]] = {c: [] for c in contestants}
        for _ in range(options.rounds):
            for ranks, mode in contestants:
                turns[ranks, mode].append(_turn(folder, ranks, mode, options.tokens))
    rows = _rows(turns, options.tokens)
    _print(rows, options.markdown)
    write_rows(rows, options.json)
    wrong = [row for row in rows if row.bytes != row.formula_bytes]
    for row in wrong:
        print(f"error: counted bytes differ from the formula's: {row}", file=sys.stderr)
    return 1 if wrong else 0


def _save_source(folder: Path, options: argparse.Namespace) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden, intermediate_size=options.inner,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=2,
        num_local_experts=options.experts, num_experts_per_tok=options.top_k, max_position_embeddings=8192,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)


def _build(folder: Path, ranks: int, mode: str) -> None:
    import moe_export

    parallel: dict[str, Any] = {"ep": ranks, "ep_mode": mode} if ranks > 1 else {}
    moe_export.build(
        folder / "source", folder / f"{ranks}-{mode}", verify=False, bench=False, threads=1, **parallel
    )


def _turn(folder: Path, ranks: int, mode: str, tokens: Sequence[int]) -> dict[str, Any]:
    """One contestant's turn: what its rank 0 measured, by number of tokens."""
    own = [
        sys.executable, __file__, "--child", str(folder / f"{ranks}-{mode}"),
        "--tokens", ",".join(map(str, tokens)),
    ]  # fmt: skip
    start = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks), "-bind-to", "core"]
    done = subprocess.run(
        [*(start if ranks > 1 else ()), *own],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: {ranks} ranks, {mode}: {done.stderr.strip()[-600:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _serve(options: argparse.Namespace) -> int:
    """A rank: rank 0 measures, the others serve."""
    from moe_export.runtime import launched, load, serve_rank

    if launched().rank:
        serve_rank(options.child, threads=1)
        return 0
    with load(options.child, threads=1) as session:
        print(json.dumps({str(tokens): _measure(session, tokens) for tokens in options.tokens}))
    return 0


def _measure(session: Any, tokens: int) -> dict[str, float]:
    import time

    import numpy as np

    from moe_export.backends.onnxruntime.exchange import exchange_use

    plan = session.manifest.expert_parallel
    # Sequences are dealt out over ranks, so there is one for each, or a single token is computed by all.
    batch = 1 if plan is None or tokens < plan.ranks else plan.ranks
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (batch, max(tokens // batch, 1)))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    formula = 0.0 if plan is None else _formula(session, inputs)
    for _ in range(2):
        session.run(inputs)
    before = exchange_use()
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        session.run(inputs)
        times.append(time.perf_counter() - began)
    after = exchange_use()

    def grown(kind: str) -> float:
        return sum(after[k] - before[k] for k in after if k.endswith(kind)) / RUNS

    return {
        "seconds": statistics.median(times),
        "exchange": grown("_seconds"),
        "bytes": grown("_bytes"),
        "formula": formula,
    }


def _formula(session: Any, inputs: dict[str, Any]) -> float:
    """Bytes of all MoE layers of a run, from the routing of these inputs."""
    import numpy as np

    from moe_export.costs import bytes_sent

    manifest = session.manifest
    plan = manifest.expert_parallel
    total = 0.0
    rows = len(inputs["input_ids"])
    dealt = -(-rows // plan.ranks) * plan.ranks
    for layer, placed, traced in zip(
        manifest.moe_layers, plan.layers, session.run_traced(inputs).layers, strict=True
    ):
        home = {expert: rank for rank, held in enumerate(placed.experts) for expert in held}
        chosen = traced.expert_ids.reshape(rows, -1, layer.top_k)
        chosen = chosen[np.minimum(np.arange(dealt), rows - 1)].reshape(plan.ranks, -1, layer.top_k)
        fullest = max(
            sum(rank in {home[e] for e in token} for token in own)
            for own in chosen
            for rank in range(plan.ranks)
        )
        sent = bytes_sent(
            plan.mode, ranks=plan.ranks, hidden=layer.hidden_size, top_k=layer.top_k,
            tokens=inputs["input_ids"].size, capacity=max(fullest, 1),
        )  # fmt: skip
        total += sent.reduced + sent.moved
    return total


def _rows(turns: dict[tuple[int, str], list[dict[str, Any]]], tokens: Sequence[int]) -> list[Row]:
    rows = []
    one = next((found for (ranks, _), found in turns.items() if ranks == 1), None)
    for (ranks, mode), found in turns.items():
        for count in tokens:
            seconds = [turn[str(count)]["seconds"] for turn in found]
            middle = statistics.median(seconds)
            base = middle if one is None else statistics.median(t[str(count)]["seconds"] for t in one)
            exchange = statistics.median(turn[str(count)]["exchange"] for turn in found)
            rows.append(
                Row(
                    ranks,
                    mode if ranks > 1 else "one rank",
                    count,
                    round(middle * 1e3, 3),
                    round((max(seconds) - min(seconds)) / middle, 3),
                    round(exchange * 1e3, 3),
                    found[0][str(count)]["bytes"],
                    found[0][str(count)]["formula"],
                    round(base / middle, 3),
                )
            )
    return rows


def _print(rows: Sequence[Row], markdown: bool) -> None:
    heads = ("ranks", "exchange", "tokens", "ms", "spread", "exchange ms", "bytes", "formula", "speed-up")
    edge = "| " if markdown else ""
    print(edge + " | ".join(heads) + edge[::-1])
    if markdown:
        print("|" + "---|" * len(heads))
    for row in rows:
        cells = (
            row.ranks, row.mode, row.tokens, f"{row.median_ms:.2f}", f"{100 * row.spread:.0f} %",
            f"{row.exchange_ms:.2f}", f"{row.bytes:,.0f}", f"{row.formula_bytes:,.0f}", f"{row.ratio:.2f}",
        )  # fmt: skip
        print(edge + " | ".join(map(str, cells)) + edge[::-1])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=numbers, default=[1, 2])
    parser.add_argument("--mode", type=several(EP_MODES), default=list(EP_MODES))
    parser.add_argument("--tokens", type=numbers, default=[1, 64, 512, 2048], help="of all ranks together")
    parser.add_argument("--rounds", type=number, default=5)
    parser.add_argument("--hidden", type=number, default=1024)
    parser.add_argument("--inner", type=number, default=2816)
    parser.add_argument("--experts", type=number, default=16)
    parser.add_argument("--top-k", type=number, default=2)
    parser.add_argument("--layers", type=number, default=2)
    parser.add_argument("--folder", type=existing_folder, default=os.environ.get("TMPDIR"))
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", type=new_file, help="write the rows to this file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
