"""``bench_bundle``: a bundle's engine against ways to run the same model without moe-export."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, choices_text
from ..progress import NullProgress, Progress
from .contest import Contest, WorkloadFiles
from .contestants import BASELINES, COMPILE, ENGINE_TITLE, EXPORT
from .entrants import Entrants
from .grid import Grid, Workload, make_grid
from .inputs import InputMaker
from .machine import Machine, describe_machine
from .process import ProcessSeat, Seat
from .rank_seat import RankSeat
from .result import ENGINE, BenchReport, Row, make_ratios
from .routing import ROUTINGS, force_all, imbalance
from .runner import CHECK_STEPS, read_arrays, write_routing
from .source import BaselineSource, find_source

ROUTING_SECONDS = 1800.0
CHECK_TOKENS = 12


def bench_bundle(
    bundle: Path | str,
    *,
    source: Path | str | object | None = None,
    batch: Sequence[int] = (1,),
    sequence: Sequence[int] = (128, 512),
    decode_tokens: int = 32,
    rounds: int = 5,
    warmup: int = 1,
    baselines: Sequence[str] | None = None,
    routing: Sequence[str] = ROUTINGS,
    threads: int | None = None,
    seed: int = 0,
    trust: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure a bundle's engine and its baselines in turns, each in its own process, with equal threads and
    inputs.

    Args:
        bundle: the bundle's folder.
        source: the model it was built from: folder, ``file.py:function`` or live module; None = where the
            manifest says. Without it there are no baselines.
        batch, sequence: the grid; cells beyond the bundle's limits are left out and named.
        decode_tokens: decode steps per round.
        rounds, warmup: measured rounds, and rounds before them that are not.
        baselines: names of :data:`moe_export.bench.BASELINES`; None = all, () = none.
        routing: ``real`` (the model's own) and routings to force.
        threads: of every contestant; None = the physical cores this process may use. Of a bundle of several
            ranks: of each rank, None = its share of the cores; the others get what all ranks of this host
            have together.
        seed: of random inputs and of forced routings.
        trust: skip the bundle's hash check.

    Returns: the report. A baseline that cannot run is in its ``skipped`` with the reason.

    Raises:
        UsageError: an argument makes no sense, or nothing of the grid fits the engine.
        BundleError: the bundle is damaged, or the engine failed.
    """
    from ..backends.onnxruntime.runner import default_threads
    from ..bundle.label import bundle_label
    from ..bundle.reader import open_bundle
    from ..runtime.joining import needs_ranks
    from ..runtime.launch import launched

    began = time.monotonic()
    ranks: list[str] = []
    names = _check_baselines(baselines)
    for name, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0), ("threads", threads, 1)):
        if value is not None and (type(value) is not int or value < least):
            raise UsageError(f"{name}: expected a whole number of {least} or more, got {value!r}")
    progress = progress or NullProgress()
    ranked = needs_ranks(bundle)
    opened = open_bundle(bundle, trust=trust, progress=progress, rank=0 if ranked else None)
    manifest = opened.manifest
    parallel = manifest.expert_parallel
    grid = make_grid(manifest, batch, sequence, decode_tokens, routing)
    each = threads
    # Ranks share the cores of a host; the others get as many threads as all ranks of this host together.
    threads = threads * (launched().local if ranked else 1) if threads else default_threads()
    machine = describe_machine(threads)
    maker = InputMaker(manifest, opened.tokenizer_path, seed)
    with Contest(manifest.quantization or manifest.dtype, progress) as contest:
        for workload, reason in grid.left_out:
            contest.skip(ENGINE, reason, workload)
        check = Workload("decode" if manifest.io.cache_inputs else "forward", min(batch), CHECK_TOKENS)
        contest.write("check", maker.inputs(_within(check, manifest.limits.max_sequence), CHECK_STEPS))
        contest.enter(
            ENGINE,
            ENGINE_TITLE,
            lambda: _engine_seat(str(opened.path), ranked, each, threads),
        )
        found = find_source(manifest, source, contest.folder / "source")
        cached = bool(manifest.io.cache_inputs)
        with Entrants(contest, found, manifest.task, threads, cached) as entrants:
            entrants.enter(names, manifest.parameters.get("total", 0) * 4)
        contest.judge()
        rows = _measure(contest, grid, maker, manifest, decode_tokens, rounds, warmup, seed)
        seat = contest.engine().seat
        if isinstance(seat, RankSeat):
            ranks = seat.notes()
        wrong = frozenset(e.info.name for e in contest.entries if e.info.sanity.ok is False)
        return BenchReport(
            bundle=bundle_label(opened.path),
            source=found.label,
            source_hash=manifest.source.hash,
            task=manifest.task,
            target=manifest.target,
            dtype=manifest.dtype,
            machine=_with_load(machine, contest),
            settings={
                "batch": list(batch), "sequence": list(sequence), "decode_tokens": decode_tokens,
                "rounds": rounds, "warmup": warmup, "routing": list(routing), "threads": threads,
                "seed": seed, "inputs": maker.described,
                **({"ranks": parallel.ranks, "ep_mode": parallel.mode} if parallel is not None else {}),
            },
            order=tuple(e.info.name for e in contest.entries),
            contestants=tuple(e.info for e in contest.entries),
            rows=rows,
            ratios=make_ratios(rows, wrong),
            skipped=tuple(contest.skipped),
            notes=(*_notes(contest, maker, found), *ranks),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - began, 1),
        )  # fmt: skip


def _engine_seat(bundle: str, ranked: bool, each: int | None, threads: int) -> Seat:
    """``each``: threads of a rank, or None for its share of the cores; ``threads``: of a single process."""
    if ranked:
        return RankSeat(bundle, each)
    return ProcessSeat({"kind": ENGINE, "bundle": bundle, "threads": threads}, threads)


def _check_baselines(baselines: Sequence[str] | None) -> tuple[str, ...]:
    if baselines is None:
        return tuple(BASELINES)
    for name in baselines:
        if name not in BASELINES:
            raise UsageError(f"baselines: unknown {name!r}; {choices_text(name, BASELINES)}")
    return tuple(name for name in BASELINES if name in baselines)


def _within(workload: Workload, most: int | None) -> Workload:
    """The workload, no longer than an engine with a small maximum takes."""
    if most is None or workload.sequence + CHECK_STEPS <= most:
        return workload
    return dataclasses.replace(workload, sequence=max(1, most - CHECK_STEPS))


def _measure(
    contest: Contest,
    grid: Grid,
    maker: InputMaker,
    manifest: Any,
    decode_tokens: int,
    rounds: int,
    warmup: int,
    seed: int,
) -> tuple[Row, ...]:
    """The model's own routing first, so that peak memory and the tracing of routing do not meet."""
    rows: list[Row] = []
    experts = [layer.num_experts for layer in manifest.moe_layers]
    real = [w for w in grid.workloads if w.routing == "real"]
    files = {
        w: contest.write(f"inputs-{i}", maker.inputs(w, decode_tokens)) for i, w in enumerate(grid.workloads)
    }
    for workload in real:
        rows += contest.measure(workload, WorkloadFiles(files[workload]), rounds, warmup)
    contest.note_memory()
    loads: dict[Workload, float | None] = {}
    for workload in (w for w in real if manifest.moe_layers and w.phase != "decode"):
        output = contest.folder / "routing.npz"
        answer = contest.engine().seat.call(
            "routing", ROUTING_SECONDS, inputs=str(files[workload]), output=str(output)
        )
        if answer["layers"] == len(experts):
            traced = read_arrays(output)
            loads[workload] = imbalance([traced[str(i)] for i in range(len(experts))], experts)
    for workload in (w for w in grid.workloads if w.routing != "real"):
        plan = force_all(workload.routing, manifest.moe_layers, workload.tokens, seed)
        loads[workload] = imbalance([ids for ids, _ in plan], experts)
        forced = contest.folder / "forced.npz"
        write_routing(forced, plan)
        rows += contest.measure(workload, WorkloadFiles(files[workload], str(forced)), rounds, warmup)
    return tuple(
        dataclasses.replace(r, imbalance=loads.get(Workload(r.phase, r.batch, r.sequence, r.routing)))
        for r in rows
    )


def _with_load(machine: Machine, contest: Contest) -> Machine:
    return dataclasses.replace(machine, foreign_cores=contest.load.foreign_cores)


def _notes(contest: Contest, maker: InputMaker, source: BaselineSource) -> tuple[str, ...]:
    notes = [f"inputs are {maker.described}; all tokens are real, so no contestant pays for padding"]
    if maker.described != "text":
        notes.append("routing of random tokens differs from that of text: read the forced routings too")
    if contest.load.foreign_cores is None:
        notes.append("the run was too short to see what other processes used")
    if source.module is not None:
        notes.append("PyTorch eager ran in the caller's process, so its memory is not known")
    running = {entry.info.name for entry in contest.entries}
    if {COMPILE, EXPORT} <= running:
        notes.append(
            "torch.compile and transformers' exporter got ready side by side; alone each is faster at it"
        )
    if any(s.contestant == COMPILE and not s.workload for s in contest.skipped):
        notes.append("torch.compile was skipped: the best alternative may be faster than the one shown")
    return tuple(notes)
