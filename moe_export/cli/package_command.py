"""``moe-export package``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moe_export.cli.options import IntList, common_options, json_option, quiet_option


@click.command("package", short_help="Write a bundle as a model repository of a server.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--format", required=True, help="triton: model repository of Triton Inference Server.")
@click.option("--name", help="Name of the model on the server.  [default: that of the bundle's folder]")
@click.option(
    "--server-path", default="/models", show_default=True, help="Where the server sees the repository."
)
@click.option(
    "--gpus", type=IntList(0), help="GPUs to run on; with ranks one for each.  [default: all, or 0 to "
    "RANKS-1]"
)
@click.option("--sm", type=click.IntRange(1), help="With ranks: whose plans, where there are several.")
@click.option("--overwrite", is_flag=True, help="Replace a package there.")
@click.option("--trust", is_flag=True, help="Skip the hash check of the bundle.")
@json_option
@quiet_option
@common_options
def command(bundle: Path, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write BUNDLE as a server wants it: a Triton model repository with configuration, files and a README.

    Bundles of target onnxruntime get their op library beside the model; of target tensorrt, one plan per GPU
    type; of target tensorrt with ranks, one plan per rank on as many GPUs. No server was run with any of them
    where moe-export is tested.
    """
    from moe_export.cli.output import print_json
    from moe_export.cli.progress import console_progress
    from moe_export.package import package_bundle

    with console_progress(quiet) as progress:
        made = package_bundle(bundle, output, progress=progress, **options)
    if as_json:
        print_json(
            {
                "path": str(made.path),
                "format": made.format,
                "model": made.model,
                "backend": made.backend,
                "notes": list(made.notes),
            }
        )
        return
    click.echo(f"packaged {made.path}: model {made.model}, backend {made.backend}")
    if quiet:
        return
    click.echo(f"how to serve it: {made.path / 'README.md'}")
