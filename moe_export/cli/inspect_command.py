"""``moe-export inspect``."""

from __future__ import annotations

import click

from moe_export.cli.options import (
    common_options,
    json_option,
    trust_remote_code_option,
    weight_format_options,
)


@click.command("inspect", short_help="Show parameters, memory, MoE layers and routing.")
@click.argument("path", metavar="SOURCE|BUNDLE|PRESET")
@click.option("--context", type=click.IntRange(1), help="Tokens per sequence.  [default: 4096]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at a time.")
@weight_format_options
@trust_remote_code_option
@json_option
@common_options
def command(
    path: str,
    context: int | None,
    batch: int,
    dtype: str | None,
    kv_dtype: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show what a model is and needs: parameters, memory, cache, work per token, GPUs, MoE layers, routing.

    Of a Hugging Face folder or a config.json only the config is read, no weights. A PRESET is a published
    model (`moe-export list presets`); a path of the same name wins. Active parameters are everything but the
    routed experts, plus the K of E that a token uses; without embeddings means without the input embedding
    matrix. Work per token and numbers of GPUs are predicted from data sheets, not measured.
    """
    from moe_export.cli.inspect_text import summary_text
    from moe_export.cli.output import print_json
    from moe_export.inspect.summary import inspect_path

    summary = inspect_path(
        path,
        trust_remote_code=trust_remote_code,
        context=context,
        batch=batch,
        weights=dtype,
        cache=kv_dtype or "",
    )
    if as_json:
        print_json(summary.to_dict())
    else:
        click.echo(summary_text(summary))
