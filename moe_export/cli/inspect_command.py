"""``moe-export inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moe_export.cli.options import common_options, json_option, trust_remote_code_option

if TYPE_CHECKING:
    from moe_export.inspect.summary import ModelSummary


@click.command("inspect", short_help="Show parameters, MoE layers and routing.")
@click.argument("path", metavar="SOURCE|BUNDLE")
@trust_remote_code_option
@json_option
@common_options
def command(path: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show parameters, MoE layers and routing of a source model or a bundle.

    Of a Hugging Face folder only config.json is needed; no weights are read. Active parameters are everything
    but the routed experts, plus the K of E that a token uses; without embeddings means without the input
    embedding matrix.
    """
    from moe_export.cli.output import print_json
    from moe_export.inspect.summary import inspect_path

    summary = inspect_path(path, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(summary.to_dict())
    else:
        click.echo(_text(summary))


def _text(summary: ModelSummary) -> str:
    from moe_export.cli.output import billions
    from moe_export.files import bytes_text

    dtype = summary.dtype or "dtype unknown"
    lines = [f"{summary.class_name} ({summary.model_type}), {dtype}, {summary.kind}"]
    details = summary.details
    if details:
        lines.append(
            f"target {details['target']}, task {details['task']}, opset {details['opset']}, "
            f"{bytes_text(details['size_bytes'])}, built {details['created']}"
        )
    names = {
        "total": "total",
        "active": "active per token",
        "active_without_embeddings": "  without embeddings",
        "routed_experts": "routed experts",
        "embeddings": "input embeddings",
    }
    lines.append("parameters")
    for name, text in names.items():
        if name in summary.parameters:
            value = summary.parameters[name]
            exact = "" if value is None else f"  ({value})"
            lines.append(f"  {text:<22}{billions(value):>12}{exact}")
    if summary.routing:
        lines.append(f"routing of the family (as tested): {summary.routing}")
    if summary.moe_layers:
        lines += ["", _layers(summary)]
    lines += [f"note: {note}" for note in summary.notes]
    return "\n".join(lines)


def _layers(summary: ModelSummary) -> str:
    from moe_export.cli.output import table

    headers = ("layer", "name", "experts", "top-k", "hidden", "intermediate", "shared", "routing")
    rows = [
        (
            layer.index,
            layer.name,
            layer.num_experts,
            _known(layer.top_k),
            _known(layer.hidden_size),
            _known(layer.intermediate_size),
            _known(layer.shared_experts),
            ", ".join(f"{k}={_short(v)}" for k, v in layer.routing.items() if v not in (None, "")),
        )
        for layer in summary.moe_layers
    ]
    return table(headers, rows)


def _known(value: int | None) -> int | str:
    return "?" if value is None else value


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}={v}" for k, v in value.items() if v is not None) + "}"
    return str(value)
