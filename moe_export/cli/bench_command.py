"""``moe-export bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moe_export.cli.options import IntList, WordList, common_options, json_option, quiet_option
from moe_export.cli.ranks import ranked_command
from moe_export.errors import UsageError


@click.command("bench", short_help="Measure an engine and its baselines, interleaved.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--source", metavar="SOURCE", help="Model to compare with.  [default: the one it was built from]"
)
@click.option("--batch", type=IntList(), default="1", show_default=True, help="Batch sizes.")
@click.option("--sequence", type=IntList(), default="128,512", show_default=True, help="Lengths in tokens.")
@click.option(
    "--decode-tokens", type=click.IntRange(1), default=32, show_default=True, help="Steps per round."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Measured rounds.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Rounds before them.")
@click.option("--baselines", type=WordList(), help="What to compare with; none for nothing.  [default: all]")
@click.option("--routing", type=WordList(), help="real,uniform,zipf,one-hot.  [default: all]")
@click.option("--min-speedup", type=float, help="Exit with 1 when a workload is less than X times faster.")
@click.option(
    "--speedup-over", type=click.Choice(("eager", "best")), default="eager", show_default=True,
    help="What --min-speedup compares with: PyTorch eager, or the fastest alternative.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of every contestant.  [default: all cores]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of random inputs.")
@click.option("--trust", is_flag=True, help="Skip the check of file hashes.")
@json_option
@quiet_option
@common_options
@ranked_command("bundle")
def command(
    bundle: Path,
    baselines: tuple[str, ...] | None,
    routing: tuple[str, ...] | None,
    min_speedup: float | None,
    speedup_over: str,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Measure an engine and its baselines, interleaved: prefill and decode, with real and forced routing.

    Every contestant runs in a process of its own, with equal threads and inputs, and its numbers are checked
    against PyTorch eager before its time counts.
    """
    from moe_export.bench import ROUTINGS, bench_bundle, format_table
    from moe_export.cli.output import print_json
    from moe_export.cli.progress import console_progress

    if min_speedup is not None and not min_speedup > 0:
        raise UsageError(f"--min-speedup {min_speedup}: expected a number above 0")
    with console_progress(quiet) as progress:
        report = bench_bundle(
            bundle,
            baselines=() if baselines == ("none",) else baselines,
            routing=ROUTINGS if routing is None else routing,
            progress=progress,
            **options,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(format_table(report))
    if min_speedup is not None:
        report.require_speedup(min_speedup, speedup_over)
    return 0
