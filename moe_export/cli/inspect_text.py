"""A model's summary as text for ``moe-export inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from moe_export.cli.output import billions, table
from moe_export.files import bytes_text
from moe_export.inspect.summary import LayerSummary, ModelSummary

_PLAIN = {"scale": 1.0, "epsilon": 0.0, "n_group": 1, "capacity": 0, "biased": 0}
"""Router attributes that say nothing when they have these values."""
_GROUPS = ("topk_group", "group_score", "group_mask")
_ALIKE = 4
"""So many alike layers in a row and more are shown as one line."""


def summary_text(summary: ModelSummary) -> str:
    """Everything that :class:`ModelSummary` holds, for people."""
    dtype = summary.dtype or "dtype unknown"
    lines = [f"{summary.class_name} ({summary.model_type}), {dtype}, {summary.kind}"]
    details = summary.details
    if "target" in details:
        lines.append(
            f"target {details['target']}, task {details['task']}, opset {details['opset']}, "
            f"{bytes_text(details['size_bytes'])}, built {details['created']}"
        )
    if "preset" in details:
        lines.append(f"{details['title']}, config from {details['source']}")
    if "weight_files" in details:
        files = details["weight_files"]
        plural = "" if files == 1 else "s"
        lines.append(f"{files} weight file{plural}, {bytes_text(details['weight_bytes'])}")
    if "quantization" in details:
        lines.append(f"weights quantised: {details['quantization']}; counted as the float model")
    lines.append("parameters")
    names = {
        "total": "total",
        "active": "active per token",
        "active_without_embeddings": "  without embeddings",
        "routed_experts": "routed experts",
        "embeddings": "input embeddings",
    }
    for name, text in names.items():
        if name in summary.parameters:
            value = summary.parameters[name]
            exact = "" if value is None else f"  ({value})"
            lines.append(f"  {text:<22}{billions(value):>12}{exact}")
    for part in (_components(summary), _published(summary), _needs(summary)):
        lines += ["", part] if part else []
    if summary.routing:
        lines += ["", f"routing of the family, as tested: {summary.routing}"]
    if summary.moe_layers:
        lines += ["", _layers(summary)]
    lines += [f"note: {note}" for note in summary.notes]
    return "\n".join(lines)


def _components(summary: ModelSummary) -> str:
    rows = [
        (name.replace("_", " "), billions(counts["total"]), billions(counts["active"]))
        for name, counts in summary.components.items()
    ]
    return table(("component", "total", "active per token"), rows) if rows else ""


def _published(summary: ModelSummary) -> str:
    rows = [
        (f["count"], f["text"], f"{f['ours_billions']:.3f} B", f["rule_text"], f["source"], f["note"])
        for f in summary.published
    ]
    return table(("published", "figure", "ours", "counting rule", "source", "note"), rows) if rows else ""


def _needs(summary: ModelSummary) -> str:
    needs = summary.needs
    if not needs:
        return ""
    sizes = ", ".join(f"{name} {size_text(size)}" for name, size in needs["weights_bytes"].items())
    lines = [f"weights: {sizes}"]
    if "kv_cache" in needs:
        lines += [*_cache(needs["kv_cache"]), "", *_work(needs), "", _gpus(needs)]
    return "\n".join(lines)


def size_text(count: float) -> str:
    """Bytes in decimal units, as data sheets give memory."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g} B"


def _cache(cache: dict[str, Any]) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in cache["layers"].items())
    text = f"cache ({cache['dtype']}; {kinds} layers): {size_text(cache['bytes_per_token'])} per token"
    if "expanded_bytes_per_token" in cache:
        text += f" (latent; whole keys and values would take {size_text(cache['expanded_bytes_per_token'])})"
    if "fixed_bytes_per_sequence" in cache:
        text += f", {size_text(cache['fixed_bytes_per_sequence'])} of state per sequence"
    tokens = f"{cache['batch']} x {cache['context']} tokens"
    return [text, f"cache of {tokens}: {size_text(cache['bytes'])}"]


def _work(needs: dict[str, Any]) -> list[str]:
    cache = needs["kv_cache"]
    title = (
        f"per token, predicted (weights in {needs['weights']}, {cache['batch']} x {cache['context']} tokens)"
    )
    rows = [
        (
            phase,
            f"{work['flops'] / 1e9:.4g} GFLOP",
            size_text(work["bytes"]),
            size_text(work["weight_bytes"]),
            size_text(work["cache_bytes"]),
            f"{work['flops_per_byte']:.3g}",
        )
        for phase, work in needs["per_token"].items()
    ]
    return [table((title, "arithmetic", "bytes", "of weights", "of cache", "FLOP/byte"), rows)]


def _gpus(needs: dict[str, Any]) -> str:
    rows = [
        (
            gpu["gpu"],
            size_text(gpu["memory_bytes"]),
            gpu["split"],
            _count(gpu["expert_parallel_all_to_all"]),
            _count(gpu["expert_parallel_all_reduce"]),
            gpu.get("reason", ""),
        )
        for gpu in needs["gpus"]
    ]
    headers = ("GPUs needed", "memory", "split evenly", "expert parallel", "(all-reduce)", "")
    share = f"{needs['usable_memory']:.0%} of a GPU's memory for weights and cache"
    return f"{table(headers, rows)}\n{share}"


def _count(value: int | None) -> str:
    return "never" if value is None else str(value)


def _layers(summary: ModelSummary) -> str:
    rows: list[tuple[object, ...]] = []
    for _, group in groupby(summary.moe_layers, key=_alike):
        run = list(group)
        if len(run) < _ALIKE:
            rows += [_row(str(layer.index), layer) for layer in run]
        else:
            rows.append(_row(f"{run[0].index}-{run[-1].index}", run[0], f" ... {run[-1].name}"))
    headers = ["layer", "name", "experts", "top-k", "hidden", "intermediate", "shared", "routing"]
    if summary.kind == "bundle":  # a graph does not say which of its other parts are shared experts
        place = headers.index("shared")
        rows = [(*row[:place], *row[place + 1 :]) for row in rows]
        headers.remove("shared")
    return table(headers, rows)


def _alike(layer: LayerSummary) -> str:
    facts = {k: v for k, v in layer.routing.items() if k != "layer"}
    return repr((layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size,
                 layer.shared_experts, _routing(facts)))  # fmt: skip


def _row(index: str, layer: LayerSummary, more: str = "") -> tuple[object, ...]:
    return (
        index,
        layer.name + more,
        layer.num_experts,
        _known(layer.top_k),
        _known(layer.hidden_size),
        _known(layer.intermediate_size),
        _known(layer.shared_experts),
        _routing(layer.routing),
    )


def _known(value: int | None) -> int | str:
    return "?" if value is None else value


def _routing(routing: dict[str, Any]) -> str:
    """What is known of a layer's router, without what is already in the table or switched off."""
    router = routing.get("router")
    if not isinstance(router, dict):
        words = [f"{k}={v}" for k, v in routing.items() if v not in (None, "")]
        return ", ".join(words)
    skipped: Sequence[str] = (
        "layer",
        "top_k",
        "selection_bias",
        *(_GROUPS if router.get("n_group", 1) == 1 else ()),
    )
    return ", ".join(
        f"{k}={v}" for k, v in router.items() if k not in skipped and _PLAIN.get(k) != v and v is not None
    )
