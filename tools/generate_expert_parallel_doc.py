"""Writes docs/expert-parallel-predicted.md: python tools/generate_expert_parallel_doc.py [--check]."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from doc_page import ROOT, write_or_check

from moe_export.cli.plan_text import time_text
from moe_export.costs import GPUS, Assumptions, weight_format
from moe_export.inspect.config_summary import Described, describe
from moe_export.inspect.model_costs import Phase
from moe_export.inspect.needs import Workload
from moe_export.planning import Layout, Prediction, Routing, predict_step, uniform_routing, zipf_routing
from moe_export.planning.steps import Machine

PAGE = ROOT / "docs" / "expert-parallel-predicted.md"
GPU = "h100"
CONTEXT = 4096
ZIPF = 1.0


@dataclass(frozen=True)
class Case:
    """A model on so many GPUs: format of its weights, sequences at decode, and replicas per MoE layer of the
    last placement."""

    preset: str
    title: str
    gpus: int
    weights: str
    batches: tuple[int, ...]
    redundant: int


CASES = (
    Case("mixtral-8x22b", "Mixtral 8x22B", 8, "bfloat16", (16, 128), 8),
    Case("mixtral-8x22b", "Mixtral 8x22B", 8, "float8", (16, 128), 8),
    Case("deepseek-v3", "DeepSeek-V3", 32, "float8", (64, 512), 32),
)

HEAD = f"""\
# Expert parallel, predicted

Written by `tools/generate_expert_parallel_doc.py` from the cost model (`moe_export/costs`,
`moe_export/planning`); a test fails when it is stale. **Everything on this page is predicted from data
sheets. Nothing of it was run on a GPU.**

- Contexts of {CONTEXT} tokens. *Decode*: one token for each sequence, the full context in the cache.
  *Prefill*: one pass, which is one prompt on each rank with all-to-all, and one prompt for all ranks together
  with all-reduce.
- *Exchange*: `all-reduce` sums float32 results of all tokens. `all-to-all` sends each token once to every
  rank that has one of its experts, and the rows back. *Fitting blocks* are as large as the fullest one has to
  be (CPU engines); *full blocks* have room for all tokens of a rank, as in TensorRT plans, whose shapes
  cannot depend on the routing.
- *Load*: uniform, or a Zipf law with exponent {ZIPF}. *Placement*: experts in their order, or
  [balanced](expert-parallel.md#placement) by exactly this load, without or with replicas, over all ranks
  alike.
- *on a GPU*: weights and cache of the fullest rank. *exchange*: part of the time. *waiting*: what ranks wait
  on average for the one whose experts take longest. *sent by a rank*: over all MoE layers of the pass.
- Not counted: what empty rows of full blocks cost the experts' kernels. How kernels, links and start-up times
  are assumed: [planning](planning.md#what-the-predictions-rest-on). float8 weights are as DeepSeek publishes
  them; moe-export does not build such plans.
"""


@dataclass(frozen=True)
class Way:
    """A row of the tables: how tokens are exchanged, how they choose experts, where those lie."""

    exchange: str
    load: str
    placement: str
    layout: Layout
    routing: Routing


@dataclass(frozen=True)
class Row:
    """What is predicted of a way for one pass; None where it does not fit."""

    way: Way
    memory: float
    tokens: int
    result: Prediction | None


def ways(case: Case, model: Described) -> Iterator[Way]:
    """All rows of a case, in order."""
    arch = model.architecture
    exchanges = (
        ("all-reduce", Layout("allreduce", case.gpus, 1)),
        ("all-to-all, fitting blocks", Layout("alltoall", case.gpus, 1)),
        ("all-to-all, full blocks", Layout("alltoall", case.gpus, 1, full_blocks=True)),
    )
    for exchange, layout in exchanges:
        yield Way(exchange, "uniform", "in order", layout, uniform_routing(arch))
        load, skewed = f"Zipf {ZIPF}", zipf_routing(arch, ZIPF)
        yield Way(exchange, load, "in order", layout, skewed)
        yield Way(exchange, load, "balanced", layout, skewed.placed_by_load())
        more = replace(layout, redundant=case.redundant)
        yield Way(exchange, load, f"balanced, {case.redundant} replicas", more, skewed.placed_by_load())


def rows(case: Case, model: Described, phase: Phase, batch: int) -> Iterator[Row]:
    """A phase of a case: one decode step of ``batch`` sequences, or one prefill pass."""
    machine = Machine(GPUS[GPU], Assumptions())
    load = Workload(weight_format(case.weights), context=CONTEXT, batch=batch)
    room = machine.gpu.memory * machine.assumptions.usable_memory
    for way in ways(case, model):
        memory = way.layout.memory(model.architecture, load)
        tokens = batch
        if phase == "prefill":
            tokens = CONTEXT * (case.gpus if way.layout.mode == "alltoall" else 1)
        result = None
        if memory <= room:
            result = predict_step(model.architecture, way.layout, phase, load, way.routing, machine)
        yield Row(way, memory, tokens, result)


def table(found: list[Row]) -> Iterator[str]:
    """Rows as a Markdown table; an exchange that fits with no placement takes one row."""
    yield (
        "| exchange | load | placement | on a GPU | predicted time | tokens/s | exchange | waiting | "
        "sent by a rank | bound |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    none_fits = {row.way.exchange for row in found} - {row.way.exchange for row in found if row.result}
    for row in found:
        way, result = row.way, row.result
        cells = [way.exchange, way.load, way.placement, f"{row.memory / 1e9:.1f} GB"]
        if way.exchange in none_fits:
            if (way.load, way.placement) != ("uniform", "in order"):
                continue
            cells[1:3] = ["any", "any"]
        if result is None:
            cells += ["does not fit", *["-"] * 5]
        else:
            seconds = result.time.seconds
            cells += [
                time_text(seconds),
                f"{row.tokens / seconds:.0f}",
                time_text(result.time.exchange),
                time_text(result.waiting),
                bytes_sent_text(result.exchange_bytes),
                result.time.bound,
            ]
        yield f"| {' | '.join(cells)} |"


def bytes_sent_text(size: float) -> str:
    """Bytes with a unit."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class Findings:
    """Numbers of the tables that the sentences below them name."""

    def __init__(self, found: list[Row]) -> None:
        self._rows = {(r.way.exchange, r.way.load, r.way.placement): r for r in found}

    def rate(self, exchange: str, load: str, placement: str) -> float:
        """Predicted tokens per second of a row that fits."""
        row = self._rows[exchange, load, placement]
        assert row.result is not None
        return row.tokens / row.result.time.seconds

    def sent(self, exchange: str, load: str, placement: str) -> float:
        """Bytes that a rank sends."""
        row = self._rows[exchange, load, placement]
        assert row.result is not None
        return row.result.exchange_bytes


FIT, FULL, SKEWED = "all-to-all, fitting blocks", "all-to-all, full blocks", f"Zipf {ZIPF}"


def sentences(decode: Findings, prefill: Findings, replicas: str) -> Iterator[str]:
    """What the tables of DeepSeek-V3 show; ``decode`` of the larger batch."""
    copied = f"balanced, {replicas}"
    order = prefill.rate(FIT, SKEWED, "in order")
    slower = prefill.rate(FIT, "uniform", "in order") / order
    placed, more = prefill.rate(FIT, SKEWED, "balanced") / order, prefill.rate(FIT, SKEWED, copied) / order
    yield (
        f"- Prefill with all-to-all is bound by exchange. Skewed load makes it {slower:.1f} times slower "
        f"with fitting blocks, as all are as large as the fullest. Balanced placement alone gives "
        f"{placed:.2f} times the tokens/s, as the busiest expert cannot be divided; with {replicas}, "
        f"{more:.1f} times."
    )
    bytes_more = prefill.sent(FULL, "uniform", "in order") / prefill.sent(FIT, "uniform", "in order")
    yield (
        f"- Full blocks send {bytes_more:.1f} times the bytes of fitting ones there at uniform load, and as "
        f"much at any other. `allreduce`, which fills no blocks, is the default."
    )
    gain = decode.rate(FULL, SKEWED, copied) / decode.rate(FULL, SKEWED, "in order")
    yield (
        f"- Decoding reads the weights of each expert in use once, however many tokens chose it. Even "
        f"numbers of tokens change little there, and every replica is one more to read: {gain:.2f} times the "
        f"tokens/s at {CASES[-1].batches[-1]} sequences with full blocks and {replicas}. What all-to-all "
        f"saves is memory: each rank keeps the cache of its own sequences only."
    )


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    last: dict[str, Findings] = {}
    for case in CASES:
        model, gpu = describe(case.preset), GPUS[GPU]
        parts.append(f"## {case.title}, {case.weights}, {case.gpus} x {gpu.title}\n")
        for batch in case.batches:
            found = list(rows(case, model, "decode", batch))
            last["decode"] = Findings(found)
            parts += [f"Decode, {batch} sequences, predicted:\n", "\n".join(table(found)), ""]
        found = list(rows(case, model, "prefill", case.gpus))
        last["prefill"] = Findings(found)
        parts += ["Prefill, predicted:\n", "\n".join(table(found)), ""]
    parts += ["## What they show\n"]
    parts += ["Of DeepSeek-V3, all predicted:\n"]
    parts += sentences(last["decode"], last["prefill"], f"{CASES[-1].redundant} replicas")
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write the page, or with ``--check`` tell whether it is fresh."""
    return write_or_check(PAGE, page, __file__)


if __name__ == "__main__":
    sys.exit(main())
