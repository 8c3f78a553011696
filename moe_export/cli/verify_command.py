"""``moe-export verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_export.cli.options import Assignment, common_options, json_option, quiet_option, read_text
from moe_export.cli.ranks import ranked_command
from moe_export.errors import UsageError
from moe_export.runtime.launch import launched

if TYPE_CHECKING:
    from moe_export.verify.result import ParityReport


@click.command("verify", short_help="Check an engine against its source model, routing included.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="SOURCE|GOLDEN", help="Model or .npz file.  [default: the model it was built from]"
)
@click.option("--trust", is_flag=True, help="Skip the check of file hashes, and nothing else.")
@click.option(
    "--force-routing", is_flag=True, help="Also run every case with the reference's routing replayed."
)
@click.option(
    "--simulate", is_flag=True, help="Run a TensorRT target's lowered graph on the CPU, without its GPU."
)
@click.option(
    "--save-golden", type=click.Path(path_type=Path), help=".npz file to verify against later, without torch."
)
@click.option(
    "--tolerance", "tolerances", type=Assignment(), multiple=True, help="A limit by name. Repeatable."
)
@click.option(
    "--text", "text_file", metavar="FILE", help="Text to verify on, in place of the built-in one; - is stdin."
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write the cases as JUnit XML.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for parity.json, .md and .junit.xml.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of random inputs.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine.  [default: all cores]")
@json_option
@quiet_option
@common_options
@ranked_command("bundle")
def command(
    bundle: Path,
    against: str | None,
    trust: bool,
    force_routing: bool,
    simulate: bool,
    save_golden: Path | None,
    tolerances: tuple[tuple[str, float], ...],
    text_file: str | None,
    junit: Path | None,
    output: Path | None,
    seed: int,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Check that an engine computes what its source model computes: outputs, MoE layers and routing.

    Exits with 1 when it does not, and names the first layer, token and expert that diverge.
    """
    from moe_export.cli.output import print_json
    from moe_export.cli.parity_text import parity_text
    from moe_export.cli.progress import console_progress
    from moe_export.verify.runner import verify_bundle

    if simulate and launched().size > 1:
        raise UsageError("--simulate runs in one process; start it without mpiexec")
    text = None if text_file is None else read_text(text_file)
    with console_progress(quiet) as progress:
        report = verify_bundle(
            bundle,
            against=against,
            trust=trust,
            force_routing=force_routing,
            tolerances=dict(tolerances) or None,
            text=text,
            seed=seed,
            save_golden=save_golden,
            threads=threads,
            progress=progress,
            simulate=simulate,
        )
    _write(report, junit, output)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(parity_text(report))
    return 0 if report.passed else 1


def _write(report: ParityReport, junit: Path | None, output: Path | None) -> None:
    from moe_export.report.junit import parity_junit
    from moe_export.verify.write import write_reports

    if output is not None:
        write_reports(report, output)
    if junit is not None:
        try:
            junit.parent.mkdir(parents=True, exist_ok=True)
            junit.write_bytes(parity_junit(report))
        except OSError as error:
            raise UsageError(f"{junit}: the report cannot be written: {error.strerror}") from error
