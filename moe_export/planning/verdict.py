"""When the mixture of experts pays: sentences from the predicted numbers, none from general knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_export.costs import Popularity
from moe_export.inspect.architecture import Architecture
from moe_export.inspect.needs import Workload

if TYPE_CHECKING:
    from moe_export.planning.plan import Dense, Option, Point

PAYS = 1.2
"""So many times the speed of a dense model of the same total size, and the experts are said to pay."""


def verdict(
    arch: Architecture,
    gpus: int,
    load: Workload,
    options: Sequence[Option],
    dense: dict[str, Dense],
    sweep: Sequence[Point],
) -> tuple[str, ...]:
    """What the comparison with dense models says, in sentences; nothing for a dense model."""
    if not arch.moe_layers:
        return ("a dense model: every token uses every parameter",)
    lines = [_memory(arch, load)]
    both = [(p.batch, p.model / p.dense_total) for p in sweep if p.model and p.dense_total]
    cards = f"on {gpus} GPU{'s' if gpus > 1 else ''}"
    pays = [batch for batch, ratio in both if ratio >= PAYS]
    loses = [batch for batch, ratio in both if ratio < PAYS]
    if pays:
        lines.append(
            f"decoding {cards} it pays at batch {_spans(pays, sweep)}: at least {PAYS} times the tokens/s of "
            "a dense model of the same total size"
        )
    if loses:
        why = ", whose matrices can be divided evenly over the GPUs" if gpus > 1 else ""
        lines.append(
            f"decoding {cards} it does not pay at batch {_spans(loses, sweep)}: less than {PAYS} times the "
            f"tokens/s of a dense model of the same total size{why}"
        )
    if not both:
        lines.append(f"{cards} no batch fits both this model and a dense one of the same total size")
    lines += _price(sweep)
    lines += _prefill(options, dense)
    lines.append(_touched(arch))
    return tuple(lines)


def _memory(arch: Architecture, load: Workload) -> str:
    whole = load.weights.bytes_of(arch.parameters())
    active = load.weights.bytes_of(arch.dense_like("active").parameters())
    return (
        f"weights take {whole / 1e9:.1f} GB, {whole / active:.1f} times those of a dense model with the same "
        f"active parameters ({active / 1e9:.1f} GB)"
    )


def _price(sweep: Sequence[Point]) -> list[str]:
    """How near it comes to a dense model of the active parameters only, at one and at most sequences."""
    both = [(p.batch, p.model, p.model / p.dense_active) for p in sweep if p.model and p.dense_active]
    ends = [both[0], both[-1]] if len(both) > 1 else both
    return [
        f"batch {batch}: {rate:.0f} tokens/s, {share:.0%} of a dense model with the same active parameters"
        for batch, rate, share in ends
    ]


def _prefill(options: Sequence[Option], dense: dict[str, Dense]) -> list[str]:
    ours = _prefill_seconds(options)
    total = _prefill_seconds(dense["total"].options) if "total" in dense else None
    active = _prefill_seconds(dense["active"].options) if "active" in dense else None
    if ours is None or (total is None and active is None):
        return []
    parts = []
    if total is not None:
        parts.append(f"{total / ours:.1f} times the speed of a dense model of the same total size")
    if active is not None:
        parts.append(f"{active / ours:.0%} of the speed of one with the same active parameters")
    return [f"prefill, each on its best layout: {', '.join(parts)}"]


def _prefill_seconds(options: Sequence[Option]) -> float | None:
    return min((o.prefill.time.seconds for o in options if o.prefill is not None), default=None)


def _touched(arch: Architecture) -> str:
    moe = arch.moe_layers[0]
    popularity = Popularity.uniform(moe.experts, moe.top_k)
    tokens = 1
    while popularity.touched(tokens) < 0.9 * moe.experts:
        tokens += 1
    return (
        f"decoding reads {moe.top_k} of {moe.experts} experts per layer for one token, and 90 % of them from "
        f"{tokens} tokens at a time on: from there to where arithmetic takes over, it reads as much memory "
        "as a dense model of its total size"
    )


def _spans(batches: Sequence[int], sweep: Sequence[Point]) -> str:
    """Batches as text, neighbours of the sweep joined: ``1-4, 64``."""
    order = [point.batch for point in sweep]
    spans: list[list[int]] = []
    for batch in batches:
        if spans and order.index(batch) == order.index(spans[-1][-1]) + 1:
            spans[-1].append(batch)
        else:
            spans.append([batch])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)
