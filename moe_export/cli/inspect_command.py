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
        lines.append(f"routing of the family, as tested: {summary.routing}")
    if summary.moe_layers:
        lines += ["", _layers(summary)]
    lines += [f"note: {note}" for note in summary.notes]
    return "\n".join(lines)


def _layers(summary: ModelSummary) -> str:
    from moe_export.cli.output import table

    columns: dict[str, list[object]] = {
        "layer": [layer.index for layer in summary.moe_layers],
        "name": [layer.name for layer in summary.moe_layers],
        "experts": [layer.num_experts for layer in summary.moe_layers],
        "top-k": [_known(layer.top_k) for layer in summary.moe_layers],
        "hidden": [_known(layer.hidden_size) for layer in summary.moe_layers],
        "intermediate": [_known(layer.intermediate_size) for layer in summary.moe_layers],
        "shared": [_known(layer.shared_experts) for layer in summary.moe_layers],
        "routing": [_routing(layer.routing) for layer in summary.moe_layers],
    }
    if summary.kind == "bundle":  # a graph does not say which of its other parts are shared experts
        del columns["shared"]
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def _known(value: int | None) -> int | str:
    return "?" if value is None else value


_PLAIN = {"scale": 1.0, "epsilon": 0.0, "n_group": 1, "capacity": 0, "biased": 0}
"""Router attributes that say nothing when they have these values."""
_GROUPS = ("topk_group", "group_score", "group_mask")


def _routing(routing: dict[str, Any]) -> str:
    """What is known of a layer's router, without what is already in the table or switched off."""
    router = routing.get("router")
    if not isinstance(router, dict):
        words = [f"{k}={v}" for k, v in routing.items() if v not in (None, "")]
        return ", ".join(words)
    skipped = {"layer", "top_k", "selection_bias", *(_GROUPS if router.get("n_group", 1) == 1 else ())}
    return ", ".join(
        f"{k}={v}" for k, v in router.items() if k not in skipped and _PLAIN.get(k) != v and v is not None
    )
