"""A plan as text for ``moe-export plan``."""

from __future__ import annotations

from moe_export.cli.inspect_text import size_text
from moe_export.cli.output import billions, table
from moe_export.planning.plan import LABEL, Option, Plan, fastest


def plan_text(plan: Plan) -> str:
    """Everything that :class:`Plan` holds, for people."""
    arch, load = plan.model.architecture, plan.load
    total, active = sum(arch.parameters().values()), sum(arch.active_parameters().values())
    weights = size_text(load.weights.bytes_of(arch.parameters()))
    lines = [
        f"{plan.model.name}: {billions(total)}, {billions(active)} active, {weights} in {load.weights.name}",
        f"{plan.gpus} x {plan.gpu.title}, {load.batch} x {load.context} tokens, cache in {load.cache}",
        f"PREDICTED: {LABEL}",
        "",
        _answer(plan),
        "",
        _options(plan),
    ]
    if (waiting := _imbalance(plan)) is not None:
        lines += ["", waiting]
    if plan.dense:
        lines += ["", _comparison(plan)]
    lines += ["", _sweep(plan), "", "when it pays" if plan.dense else "about the model"]
    lines += [f"- {line}" for line in plan.verdict]
    lines += ["", _assumptions(plan), *(f"note: {note}" for note in plan.notes)]
    return "\n".join(lines)


def _answer(plan: Plan) -> str:
    best = plan.best
    if best is None:
        return "does not fit"
    assert best.decode is not None and best.prefill is not None and best.first_token_s is not None
    decode, prefill = best.decode.time, best.prefill.time
    tokens = plan.load.batch * plan.load.context
    return (
        f"fits: {best.layout.text}\n"
        f"decode: {time_text(decode.seconds)} per token, {plan.load.batch / decode.seconds:.0f} tokens/s, "
        f"bound by {decode.bound}\n"
        f"prefill of all: {time_text(prefill.seconds)}, {tokens / prefill.seconds:.0f} tokens/s, bound by "
        f"{prefill.bound}; one prompt alone: {time_text(best.first_token_s)}"
    )


def _options(plan: Plan) -> str:
    rows = [
        (
            "*" if option is plan.best else "",
            option.layout.text,
            "yes" if option.fits else "no",
            size_text(option.memory),
            option.largest_batch or "-",
            *_times(option, plan.load.batch),
        )
        for option in plan.options
    ]
    headers = (
        "",
        "layout",
        "fits",
        "on a GPU",
        "most sequences",
        "decode",
        "tokens/s",
        "bound",
        "prefill",
        "bound",
    )
    return table(headers, rows)


def _times(option: Option, batch: int) -> tuple[str, ...]:
    if option.decode is None or option.prefill is None:
        return ("-",) * 5
    decode, prefill = option.decode.time, option.prefill.time
    return (
        time_text(decode.seconds),
        f"{batch / decode.seconds:.0f}",
        decode.bound,
        time_text(prefill.seconds),
        prefill.bound,
    )


def _imbalance(plan: Plan) -> str | None:
    facts = plan.imbalance()
    if facts is None:
        return None
    routing = plan.routing.to_dict()
    what = {
        "uniform": "uniform routing",
        "zipf": f"Zipf routing, exponent {routing.get('exponent')}",
        "trace": f"routing as in {routing.get('file')}",
    }[plan.routing.kind]
    rows = []
    for phase in ("decode", "prefill"):
        f = facts[phase]
        over = f"{f['over_uniform']:.2f} x" if "over_uniform" in f else "-"
        placed = time_text(f["placed_by_load_s"]) if "placed_by_load_s" in f else "-"
        rows.append((phase, time_text(f["seconds"]), time_text(f["waiting_s"]), over, placed))
    title = f"{what} (busiest expert {routing['max_over_mean']:.2f} x the mean)"
    placed_title = "experts placed by load"
    if plan.placed is not None and plan.placed.layout.redundant:
        placed_title += f", {plan.placed.layout.redundant} redundant"
    return table(
        (title, "time", "of it waiting for the busiest rank", "against uniform", placed_title),
        rows,
    )


def _comparison(plan: Plan) -> str:
    rows: list[tuple[object, ...]] = [_compared(plan.model.name, plan.best, plan, None)]
    for which, dense in plan.dense.items():
        size = sum(dense.architecture.parameters().values())
        rows.append(_compared(f"dense, same {which} size", fastest(dense.options), plan, size))
    headers = (
        "compared with dense models",
        "parameters",
        "layout",
        "decode",
        "tokens/s",
        "bound",
        "prefill",
        "bound",
    )
    return table(headers, rows)


def _compared(name: str, option: Option | None, plan: Plan, size: int | None) -> tuple[object, ...]:
    count = size if size is not None else sum(plan.model.architecture.parameters().values())
    if option is None:
        return (name, billions(count), "does not fit", *("-",) * 5)
    return (name, billions(count), option.layout.text, *_times(option, plan.load.batch))


def _sweep(plan: Plan) -> str:
    names = ["model"] + (["dense_active", "dense_total"] if plan.dense else [])
    headers = ["batch", plan.model.name, "dense, same active", "dense, same total"][: len(names) + 1]
    rows = [
        (p.batch, *("does not fit" if (rate := getattr(p, n)) is None else f"{rate:.0f}" for n in names))
        for p in plan.sweep
    ]
    return "decoded tokens/s, each on its best layout\n" + table(headers, rows)


def _assumptions(plan: Plan) -> str:
    a = plan.assumptions
    return (
        f"assumed: kernels reach {a.compute:.0%} of the sheet's arithmetic, {a.memory:.0%} of its memory and "
        f"{a.link:.0%} of its link bandwidth; {time_text(a.kernel_s)} per kernel, "
        f"{time_text(a.exchange_s)} per exchange; {a.usable_memory:.0%} of memory for weights and cache"
    )


def time_text(seconds: float) -> str:
    """Seconds with four digits and a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"
