"""The plan: does it fit, on which layout, how fast, what uneven load costs, what a dense model would do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_export.costs import Assumptions, Gpu, WeightFormat
from moe_export.errors import UsageError
from moe_export.inspect.architecture import Architecture
from moe_export.inspect.config_summary import Described
from moe_export.inspect.needs import Workload
from moe_export.planning.layout import EP_MODES, Layout, Mode, layouts
from moe_export.planning.notes import notes
from moe_export.planning.routing import Routing, uniform_routing
from moe_export.planning.steps import Machine, Prediction, predict_step
from moe_export.planning.verdict import verdict

LABEL = "predicted from data sheets; nothing was run on a GPU"
DENSE: tuple[Literal["active", "total"], ...] = ("active", "total")


@dataclass(frozen=True)
class Option:
    """One layout with its memory and predicted times; times are None where it does not fit."""

    layout: Layout
    memory: float
    largest_batch: int
    fits: bool
    decode: Prediction | None = None
    prefill: Prediction | None = None
    first_token_s: float | None = None

    def to_dict(self, load: Workload) -> dict[str, Any]:
        """Plain JSON values; bytes on the fullest GPU, tokens/s over all GPUs."""
        facts: dict[str, Any] = {
            "layout": self.layout.text,
            "mode": self.layout.mode,
            "ranks": self.layout.ranks,
            "replicas": self.layout.replicas,
            "memory_bytes": round(self.memory),
            "largest_batch": self.largest_batch,
            "fits": self.fits,
        }
        if self.decode is not None and self.prefill is not None:
            tokens = load.batch * load.context
            facts["decode"] = {
                **self.decode.to_dict(), "tokens_per_s": load.batch / self.decode.time.seconds
            }  # fmt: skip
            facts["prefill"] = {**self.prefill.to_dict(), "tokens_per_s": tokens / self.prefill.time.seconds}
            facts["first_token_s"] = self.first_token_s
        return facts


@dataclass(frozen=True)
class Dense:
    """A dense model to compare with, and its layouts on the same GPUs."""

    architecture: Architecture
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Point:
    """Predicted decode tokens/s at one batch, on the best layout that fits; None where none does."""

    batch: int
    model: float | None
    dense_active: float | None
    dense_total: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Plain JSON values."""
        return {
            "batch": self.batch,
            "model": self.model,
            "dense_same_active": self.dense_active,
            "dense_same_total": self.dense_total,
        }


@dataclass(frozen=True)
class Plan:
    """Everything that :func:`make_plan` predicts."""

    model: Described
    gpu: Gpu
    gpus: int
    load: Workload
    routing: Routing
    assumptions: Assumptions
    options: tuple[Option, ...]
    best: Option | None
    uniform: Option | None
    """The best option's layout with uniform routing, where the plan's routing is another."""
    placed: Option | None
    """The best option with experts placed by their load, where the routing is uneven and there are ranks."""
    dense: dict[str, Dense]
    sweep: tuple[Point, ...]
    verdict: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        arch = self.model.architecture
        return {
            "predicted": True,
            "label": LABEL,
            "model": {
                "name": self.model.name,
                "class_name": arch.class_name,
                "total": sum(arch.parameters().values()),
                "active": sum(arch.active_parameters().values()),
                "weights": self.load.weights.name,
                "weights_bytes": self.load.weights.bytes_of(arch.parameters()),
            },
            "gpu": self.gpu.to_dict(),
            "gpus": self.gpus,
            "workload": {
                "context": self.load.context, "batch": self.load.batch, "cache": self.load.cache,
            },
            "routing": self.routing.to_dict(),
            "assumptions": self.assumptions.to_dict(),
            "fits": self.best is not None,
            "best": None if self.best is None else self.best.to_dict(self.load),
            "options": [option.to_dict(self.load) for option in self.options],
            "imbalance": self.imbalance(),
            "dense": {
                f"same_{which}": {
                    "parameters": sum(dense.architecture.parameters().values()),
                    "best": option.to_dict(self.load) if (option := fastest(dense.options)) else None,
                }
                for which, dense in self.dense.items()
            },
            "sweep": [point.to_dict() for point in self.sweep],
            "verdict": list(self.verdict),
            "notes": list(self.notes),
        }  # fmt: skip

    def imbalance(self) -> dict[str, Any] | None:
        """What uneven expert load costs the best option; None where there are no ranks or no experts."""
        if self.best is None or self.best.decode is None or self.best.prefill is None:
            return None
        if not self.model.architecture.moe_layers:
            return None
        facts: dict[str, Any] = {}
        for phase, here in (("decode", self.best.decode), ("prefill", self.best.prefill)):
            facts[phase] = {
                "seconds": here.time.seconds,
                "waiting_s": here.waiting,
                "without_waiting_s": here.time.seconds - here.waiting,
            }
            even = None if self.uniform is None else getattr(self.uniform, phase)
            if even is not None:
                facts[phase]["uniform_routing_s"] = even.time.seconds
                facts[phase]["over_uniform"] = here.time.seconds / even.time.seconds
            placed = None if self.placed is None else getattr(self.placed, phase)
            if placed is not None:
                facts[phase]["placed_by_load_s"] = placed.time.seconds
                facts[phase]["placed_waiting_s"] = placed.waiting
        return facts


def make_plan(
    model: Described,
    gpu: Gpu,
    gpus: int,
    *,
    context: int,
    batch: int,
    weights: WeightFormat,
    cache: str = "",
    routing: Routing | None = None,
    mode: str | None = None,
    redundant_experts: int = 0,
    assumptions: Assumptions | None = None,
) -> Plan:
    """Predict what serving ``model`` on ``gpus`` times ``gpu`` takes.

    ``context``: tokens in the cache of each of ``batch`` sequences, and of each prompt at prefill. ``mode``:
    ``allreduce`` or ``alltoall``; the faster by default. ``routing``: uniform by default.
    ``redundant_experts``: replicas per MoE layer where experts are placed by their load.

    Raises:
        UsageError: numbers below 1, an unknown mode or format.
    """
    if gpus < 1:
        raise UsageError(f"gpus is {gpus}; expected 1 or more")
    if mode is not None and mode not in EP_MODES:
        raise UsageError(f"no expert-parallel mode {mode!r}; choices: {', '.join(EP_MODES)}")
    arch = model.architecture
    modes: tuple[Mode, ...] = tuple(m for m in EP_MODES if mode in (None, m))
    load = Workload(weights, cache, context, batch)
    machine = Machine(gpu, assumptions or Assumptions())
    routing = routing or uniform_routing(arch)
    options = tuple(_option(arch, layout, load, routing, machine) for layout in layouts(arch, gpus, modes))
    best = fastest(options)
    uniform = placed = None
    if best is not None and routing.kind != "uniform":
        uniform = _option(arch, best.layout, load, uniform_routing(arch), machine)
        if best.layout.ranks > 1:
            way = replace(best.layout, redundant=redundant_experts)
            placed = _option(arch, way, load, routing.placed_by_load(), machine)
    dense: dict[str, Dense] = {}
    if arch.moe_layers:
        none = Routing("uniform", ())
        for which in DENSE:
            like = arch.dense_like(which)
            found = (_option(like, layout, load, none, machine) for layout in layouts(like, gpus))
            dense[which] = Dense(like, tuple(found))
    sweep = _sweep(arch, dense, load, routing, machine, gpus, modes)
    ways = tuple(option.layout for option in options)
    return Plan(
        model=model,
        gpu=gpu,
        gpus=gpus,
        load=load,
        routing=routing,
        assumptions=machine.assumptions,
        options=options,
        best=best,
        uniform=uniform,
        placed=placed,
        dense=dense,
        sweep=sweep,
        verdict=verdict(arch, gpus, load, options, dense, sweep),
        notes=notes(arch, load, machine, ways, best is not None),
    )


def fastest(options: tuple[Option, ...]) -> Option | None:
    """The option that decodes fastest among those that fit; fewer ranks at equal speed."""
    fitting = [option for option in options if option.fits and option.decode is not None]
    return min(fitting, key=_decode_seconds) if fitting else None


def _decode_seconds(option: Option) -> tuple[float, int]:
    return (option.decode.time.seconds if option.decode else float("inf"), option.layout.ranks)


def _option(arch: Architecture, layout: Layout, load: Workload, routing: Routing, machine: Machine) -> Option:
    room = machine.gpu.memory * machine.assumptions.usable_memory
    memory = layout.memory(arch, load)
    option = Option(layout, memory, layout.largest_batch(arch, load, room), memory <= room)
    if not option.fits:
        return option
    mine = layout.sequences(load.batch)
    passes = -(-mine // layout.ranks) if layout.mode == "alltoall" else mine
    alone = replace(load, batch=1)
    return replace(
        option,
        decode=predict_step(arch, layout, "decode", load, routing, machine),
        prefill=predict_step(arch, layout, "prefill", load, routing, machine).times(passes),
        first_token_s=predict_step(arch, layout, "prefill", alone, routing, machine).time.seconds,
    )


def _sweep(
    arch: Architecture,
    dense: dict[str, Dense],
    load: Workload,
    routing: Routing,
    machine: Machine,
    gpus: int,
    modes: tuple[Mode, ...],
) -> tuple[Point, ...]:
    """Decode tokens/s at batches of powers of two, to beyond the plan's own batch."""
    batches = sorted({2**power for power in range(11)} | {load.batch})
    points = []
    for batch in batches:
        at = replace(load, batch=batch)
        rates = [_rate(arch, layouts(arch, gpus, modes), at, routing, machine)]
        for which in DENSE:
            if which not in dense:
                rates.append(None)
                continue
            like = dense[which].architecture
            rates.append(_rate(like, layouts(like, gpus), at, Routing("uniform", ()), machine))
        points.append(Point(batch, *rates))
    return tuple(points)


def _rate(
    arch: Architecture, ways: tuple[Layout, ...], load: Workload, routing: Routing, machine: Machine
) -> float | None:
    room = machine.gpu.memory * machine.assumptions.usable_memory
    times = [
        predict_step(arch, layout, "decode", load, routing, machine).time.seconds
        for layout in ways
        if layout.memory(arch, load) <= room
    ]
    return load.batch / min(times) if times else None
