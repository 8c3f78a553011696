"""``moe-export list``: what the registries hold."""

from __future__ import annotations

from typing import Any

import click

from moe_export.cli.options import common_options, json_option
from moe_export.config import CPU_LOWERINGS, GPU_LOWERINGS
from moe_export.schema import DTYPES


@click.group("list", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """List the registered families, ops, targets, presets or GPUs."""


@command.command("families")
@click.option("--status", type=click.Choice(("works", "limited", "refused")), help="Only these.")
@json_option
@common_options
def families(status: str | None, as_json: bool) -> None:
    """MoE model families: works, limited or refused, with the reason."""
    from moe_export.models.families import FAMILIES

    rows = [
        {
            "name": f.name,
            "status": f.status,
            "reason": f.reason,
            "routing": f.routing,
            "model_class": f.model_class or None,
            "tasks": list(f.tasks),
            "scope": f.scope,
        }
        for f in FAMILIES.values()
        if status in (None, f.status)
    ]
    columns = ("name", "status", "routing", "reason")
    _show(rows, columns, as_json)
    if not as_json:
        counts = {s: sum(r["status"] == s for r in rows) for s in ("works", "limited", "refused")}
        click.echo("\n" + ", ".join(f"{count} {name}" for name, count in counts.items() if count))


@command.command("ops")
@json_option
@common_options
def ops(as_json: bool) -> None:
    """Ops of the moe_export domain."""
    from moe_export.ops import DOMAIN, OPS, VERSION

    rows = [
        {
            "name": op.name,
            "domain": DOMAIN,
            "version": VERSION,
            "inputs": [p.name for p in op.inputs],
            "outputs": [p.name for p in op.outputs],
            "attributes": [a.name for a in op.attributes],
            "body": op.body is not None,
            "collective": op.collective,
            "summary": " ".join(op.summary.split()),
        }
        for op in OPS.values()
    ]
    _show(rows, ("name", "inputs", "outputs", "summary"), as_json)


@command.command("targets")
@json_option
@common_options
def targets(as_json: bool) -> None:
    """Targets an engine can be built for: by SM, dtype and lowering, and what this machine has of it."""
    from moe_export.backends import BACKENDS
    from moe_export.backends.trt.machine import target_matrix
    from moe_export.cli.output import print_json, table
    from moe_export.inspect.environment import target_statuses
    from moe_export.passes.pipelines import PIPELINES
    from moe_export.schema import to_json
    from moe_export.sms import GPU_TARGETS

    statuses = {t.name: t for t in target_statuses()}
    matrix = {name: target_matrix(name) if name in GPU_TARGETS else () for name in BACKENDS}
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "available": statuses[name].available,
                    "builds": statuses[name].builds,
                    "runs": statuses[name].runs,
                    "lacks": list(statuses[name].lacks),
                    "summary": backend.summary,
                    "dtypes": list(DTYPES),
                    "lowerings": list(GPU_LOWERINGS if name in GPU_TARGETS else CPU_LOWERINGS),
                    "passes": [p.name for p in PIPELINES[name]],
                    "sms": [to_json(row) for row in matrix[name]],
                }
                for name, backend in BACKENDS.items()
            ]
        )
        return
    rows = [
        (name, _yes(statuses[name].builds), _yes(statuses[name].runs), backend.summary)
        for name, backend in BACKENDS.items()
    ]
    click.echo(table(("target", "builds here", "runs here", "summary"), rows))
    lines: list[tuple[str, ...]] = []
    for name in BACKENDS:
        own = " ".join(CPU_LOWERINGS[1:]) if name == "onnxruntime" else "bodies"
        status = statuses[name]
        if name not in GPU_TARGETS:
            lines.append((name, "CPU", "", " ".join(DTYPES), own, _yes(status.builds), _yes(status.runs)))
        for r in matrix[name]:
            words = (" ".join(r.dtypes), " ".join(r.lowerings))
            lines.append((r.target, f"SM{r.sm}", r.gpus, *words, _yes(r.builds), _yes(r.runs)))
    headers = ("target", "SM", "GPUs", "dtypes", "expert lowerings", "builds here", "runs here")
    click.echo("\n" + table(headers, lines))
    for name in BACKENDS:
        if statuses[name].lacks:
            click.echo(f"\n{name} lacks here:\n  " + "\n  ".join(statuses[name].lacks))


@command.command("presets")
@json_option
@common_options
def presets(as_json: bool) -> None:
    """Published models that inspect and plan know by name."""
    from moe_export.cli.output import billions
    from moe_export.inspect.presets import presets as known

    rows: list[dict[str, Any]] = []
    for preset in known().values():
        arch = preset.architecture
        counts = [sum(arch.parameters().values()), sum(arch.active_parameters().values())]
        experts = sorted({(moe.experts, moe.top_k) for moe in arch.moe_layers})
        rows.append(
            {
                "name": preset.name,
                "title": preset.title,
                "aliases": list(preset.aliases),
                "total": counts[0],
                "active": counts[1],
                "experts": experts[0][0] if experts else None,
                "top_k": experts[0][1] if experts else None,
                "moe_layers": len(arch.moe_layers),
                "layers": len(arch.layers),
                "weights": preset.weights,
                "source": preset.source,
            }
        )
    if as_json:
        _show(rows, (), as_json)
        return
    for row in rows:
        row["total"], row["active"] = billions(row["total"]), billions(row["active"])
        row["experts"] = f"{row['top_k']} of {row['experts']}" if row["experts"] else "dense"
    _show(rows, ("name", "total", "active", "experts", "layers", "weights", "title"), as_json)


@command.command("gpus")
@json_option
@common_options
def gpus(as_json: bool) -> None:
    """GPUs whose data sheets inspect and plan predict with."""
    from moe_export.cli.output import table
    from moe_export.costs import GPUS

    rows = [gpu.to_dict() for gpu in GPUS.values()]
    if as_json:
        _show(rows, (), as_json)
        return
    headers = ("name", "memory GB", "GB/s", "TFLOPS 16 bit", "float8", "link GB/s", "network GB/s", "source")
    lines = [
        (
            gpu.name,
            f"{gpu.memory / 1e9:g}",
            f"{gpu.bandwidth / 1e9:g}",
            f"{gpu.peaks['bfloat16'] / 1e12:g}",
            f"{gpu.peaks['float8'] / 1e12:g}" if "float8" in gpu.peaks else "-",
            f"{gpu.link / 1e9:g}",
            f"{gpu.network / 1e9:g}",
            gpu.source,
        )
        for gpu in GPUS.values()
    ]
    click.echo(table(headers, lines))
    click.echo("\nPeaks are dense. Link and network: one direction, per GPU.")


def _show(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    from moe_export.cli.output import print_json, table

    if as_json:
        print_json(rows)
    else:
        click.echo(table(columns, [[_cell(row[c]) for c in columns] for row in rows]))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
