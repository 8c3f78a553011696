"""``moe-export export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moe_export.cli.options import (
    common_options,
    json_option,
    quiet_option,
    resume_option,
    trust_remote_code_option,
)
from moe_export.config import DEFAULT_OPSET, WEIGHTS
from moe_export.schema import DTYPES, TASKS


@click.command("export", short_help="Export SOURCE to portable ONNX, nothing more.")
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Numbers.")
@click.option("--task", type=click.Choice(TASKS), help="What the model is for.  [default: from the model]")
@click.option("--opset", type=int, default=DEFAULT_OPSET, show_default=True, help="ONNX opset.")
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="auto",
    show_default=True,
    help="reference: leave the weights in the checkpoint's files, which the export then shares; stream: read "
    "them one by one and write them anew; load: read them all first; auto: referenced from 2 GiB on, where "
    "that is possible.",
)
@click.option("--layers", type=click.IntRange(1), help="Only the first N layers, a trial.  [default: all]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export at the output.")
@resume_option
@trust_remote_code_option
@json_option
@quiet_option
@common_options
def command(source: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> int:
    """Export SOURCE to portable ONNX only: standard ops, and moe_export ops with function bodies.

    model.onnx runs in any ONNX runtime, without a library of moe-export. Nothing is verified or measured.

    The weights of a large model folder stay in its files: the export shares those files (hard links below
    checkpoint/) and holds no weight in memory.
    """
    from moe_export.api import export
    from moe_export.cli.output import print_json
    from moe_export.cli.progress import console_progress

    with console_progress(quiet) as progress:
        path = export(source, output, progress=progress, **options)
    if as_json:
        print_json({"path": str(path)})
    else:
        click.echo(f"exported {path}")
    return 0
