"""``moe-export trace``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_export.cli.options import common_options, quiet_option, read_text, trust_remote_code_option
from moe_export.cli.ranks import ranked_command
from moe_export.errors import UsageError

if TYPE_CHECKING:
    from moe_export.inspect.placement_use import PlacementUse, RankUse
    from moe_export.inspect.usage import Spread, Usage


@click.command("trace")
@click.argument("path", metavar="SOURCE|BUNDLE")
@click.option("--data", "data_file", required=True, metavar="FILE", help="UTF-8 text; - is stdin.")
@click.option("--json", "json_file", metavar="FILE", help="Write the counts as JSON; - is stdout.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw layers × experts to a .png or .svg file.")
@click.option("--window", type=click.IntRange(1), default=512, show_default=True, help="Tokens per run.")
@click.option(
    "--placement-of",
    metavar="BUNDLE",
    help="Tell how an expert-parallel bundle's placement spreads this load over its ranks.  [default: of the "
    "traced bundle]",
)
@click.option("--max-tokens", type=click.IntRange(1), help="Leave out what is behind so many tokens.")
@click.option("--threads", type=click.IntRange(1), help="Threads to run with.  [default: all cores]")
@click.option("--trust", is_flag=True, help="Skip the check of a bundle's file hashes.")
@trust_remote_code_option
@quiet_option
@common_options
@ranked_command("path")
def command(
    path: str,
    data_file: str,
    json_file: str | None,
    plot: Path | None,
    window: int,
    placement_of: str | None,
    max_tokens: int | None,
    threads: int | None,
    trust: bool,
    trust_remote_code: bool,
    quiet: bool,
) -> int:
    """Count how often each expert is chosen on a text, and how that varies from window to window.

    A bundle is run by its engine, a Hugging Face folder by its own PyTorch code. Entropy is that of the
    choices, over log E: 1 means that all experts are chosen equally often. Max/mean is the busiest expert's
    load over the mean: of all tokens, and its median, 95th percentile and maximum over the windows. The JSON
    is what `build --placement balanced --trace FILE` takes.
    """
    from moe_export.cli.output import print_json
    from moe_export.cli.progress import console_progress
    from moe_export.inspect.placement_use import parallel_of, placement_use
    from moe_export.inspect.tracing import trace_path
    from moe_export.inspect.usage import check_plot_path, plot_usage

    if plot is not None:
        check_plot_path(plot)
    text = read_text(data_file)
    parallel = parallel_of(placement_of or path)
    if placement_of is not None and parallel is None:
        raise UsageError(f"--placement-of {placement_of}: not an expert-parallel bundle")
    with console_progress(quiet) as progress:
        usage = trace_path(
            path,
            text,
            window=window,
            max_tokens=max_tokens,
            trust=trust,
            trust_remote_code=trust_remote_code,
            threads=threads,
            progress=progress,
        )
    placed = None if parallel is None else placement_use(usage, placement_of or path, parallel)
    values = {**usage.to_dict(), **({} if placed is None else {"placement": placed.to_dict()})}
    if plot is not None:
        plot_usage(usage, plot)
    if json_file == "-":
        print_json(values)
        return 0
    if json_file is not None:
        import json

        Path(json_file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    click.echo(_text(usage))
    if placed is not None:
        click.echo(_placement_text(placed))
    return 0


def _text(usage: Usage) -> str:
    from moe_export.cli.output import table

    headers = (
        "layer",
        "name",
        "experts",
        "entropy",
        "max/mean",
        "p50",
        "p95",
        "max",
        "unused",
        "dropped",
        "busiest",
    )
    rows = []
    for layer in usage.layers:
        total = max(int(layer.counts.sum()), 1)
        order = sorted(range(len(layer.counts)), key=lambda e: (-int(layer.counts[e]), e))[:4]
        busiest = ", ".join(f"{e}: {100 * int(layer.counts[e]) / total:.1f} %" for e in order)
        rows.append(
            (
                layer.index,
                layer.name,
                len(layer.counts),
                f"{layer.entropy:.3f}",
                f"{layer.max_over_mean:.2f}",
                *_spread_text(layer.by_window),
                layer.unused,
                layer.dropped,
                busiest,
            )
        )
    windows = f"p50, p95, max: of max/mean over {usage.windows} windows of {usage.window} tokens"
    return f"{usage.tokens} tokens; {windows}\n{table(headers, rows)}"


def _spread_text(spread: Spread) -> tuple[str, str, str]:
    return f"{spread.p50:.2f}", f"{spread.p95:.2f}", f"{spread.max:.2f}"


def _placement_text(use: PlacementUse) -> str:
    """Per layer the busiest rank's load over the mean, contiguous and as placed."""
    from moe_export.cli.output import table

    def cells(one: RankUse | None) -> tuple[str, ...]:
        return ("-",) * 4 if one is None else (f"{one.overall:.2f}", *_spread_text(one.by_window))

    rows = [(layer.index, *cells(layer.contiguous), *cells(layer.placed)) for layer in use.layers]
    parallel = use.parallel
    title = (
        f"\nbusiest rank over the mean of {parallel.ranks} ranks, placement of {use.bundle} "
        f"({parallel.placement}, {parallel.redundant_experts} redundant experts)"
    )
    headers = ("layer", "contiguous", "p50", "p95", "max", "as placed", "p50", "p95", "max")
    return f"{title}\n{table(headers, rows)}"
