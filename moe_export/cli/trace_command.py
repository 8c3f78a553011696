"""``moe-export trace``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_export.cli.options import common_options, quiet_option, read_text, trust_remote_code_option

if TYPE_CHECKING:
    from moe_export.inspect.usage import Usage


@click.command("trace")
@click.argument("path", metavar="SOURCE|BUNDLE")
@click.option("--text", "text_file", required=True, metavar="FILE", help="UTF-8 text; - is stdin.")
@click.option("--json", "json_file", metavar="FILE", help="Write the counts as JSON; - is stdout.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw layers × experts to a .png or .svg file.")
@click.option("--window", type=click.IntRange(1), default=512, show_default=True, help="Tokens per run.")
@click.option("--max-tokens", type=click.IntRange(1), help="Leave out what is behind so many tokens.")
@click.option("--threads", type=click.IntRange(1), help="Threads to run with.  [default: all cores]")
@click.option("--trust", is_flag=True, help="Skip the check of a bundle's file hashes.")
@trust_remote_code_option
@quiet_option
@common_options
def command(
    path: str,
    text_file: str,
    json_file: str | None,
    plot: Path | None,
    window: int,
    max_tokens: int | None,
    threads: int | None,
    trust: bool,
    trust_remote_code: bool,
    quiet: bool,
) -> int:
    """Count how often each expert is chosen on a text.

    A bundle is run by its engine, a Hugging Face folder by its own PyTorch code. Entropy is that of the
    choices, over log E: 1 means that all experts are chosen equally often. Max/mean is the busiest expert's
    load over the mean.
    """
    from moe_export.cli.output import print_json
    from moe_export.cli.progress import console_progress
    from moe_export.inspect.tracing import trace_path
    from moe_export.inspect.usage import check_plot_path, plot_usage

    if plot is not None:
        check_plot_path(plot)
    text = read_text(text_file)
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
    if plot is not None:
        plot_usage(usage, plot)
    if json_file == "-":
        print_json(usage.to_dict())
        return 0
    if json_file is not None:
        import json

        Path(json_file).write_text(json.dumps(usage.to_dict(), indent=2) + "\n", encoding="utf-8")
    click.echo(_text(usage))
    return 0


def _text(usage: Usage) -> str:
    from moe_export.cli.output import table

    headers = ("layer", "name", "experts", "entropy", "max/mean", "unused", "dropped", "busiest")
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
                layer.unused,
                layer.dropped,
                busiest,
            )
        )
    return f"{usage.tokens} tokens\n{table(headers, rows)}"
