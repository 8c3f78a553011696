"""``moe-export plan``."""

from __future__ import annotations

from pathlib import Path

import click

from moe_export.cli.options import Assignment, common_options, json_option, weight_format_options


@click.command("plan", short_help="Predict what serving a model takes on some GPUs.")
@click.argument("path", metavar="PRESET|SOURCE")
@click.option("--gpu", default="h100", show_default=True, help="GPU type; see `moe-export list gpus`.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="Number of GPUs.")
@click.option(
    "--context",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens that each sequence has in its cache, and that each prompt has.",
)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Sequences at a time.")
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Expert load as `moe-export trace --json FILE` counted it.",
)
@click.option("--zipf", type=float, help="Expert load by a Zipf law with this exponent; 0 is uniform.")
@weight_format_options
@click.option(
    "--ep-mode",
    type=click.Choice(("allreduce", "alltoall")),
    help="How ranks exchange tokens.  [default: the faster]",
)
@click.option(
    "--redundant-experts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Replicas of busy experts per MoE layer where experts are placed by their load.",
)
@click.option(
    "--assume",
    type=Assignment(),
    multiple=True,
    help="Change an assumption: compute, memory, link, usable_memory (shares), kernel_s, exchange_s "
    "(seconds). Repeatable.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw tokens/s over batch to a .png or .svg file."
)
@json_option
@common_options
def command(
    path: str,
    gpu: str,
    gpus: int,
    context: int,
    batch: int,
    trace: Path | None,
    zipf: float | None,
    dtype: str | None,
    kv_dtype: str | None,
    ep_mode: str | None,
    redundant_experts: int,
    assume: tuple[tuple[str, float], ...],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Predict what serving a model takes: does it fit, on which layout, how fast, and does the MoE pay.

    PRESET is a published model (`moe-export list presets`), SOURCE a config.json or a folder with one; no
    weights are read. All times are predicted from data sheets; nothing is run on a GPU.
    """
    from moe_export.cli.output import print_json
    from moe_export.cli.plan_text import plan_text
    from moe_export.costs import Assumptions, find_gpu, weight_format
    from moe_export.errors import UsageError, choices_text
    from moe_export.inspect.config_summary import describe
    from moe_export.planning import make_plan, read_trace, zipf_routing

    if trace is not None and zipf is not None:
        raise UsageError("--trace and --zipf both say how experts are loaded; give one of them")
    if redundant_experts and trace is None and zipf is None:
        raise UsageError("--redundant-experts is for uneven expert load; it needs --trace or --zipf")
    known = Assumptions().to_dict()
    for name, _ in assume:
        if name not in known:
            raise UsageError(f"--assume {name}: no such assumption; {choices_text(name, known)}")
    if plot is not None:
        from moe_export.inspect.usage import check_plot_path

        check_plot_path(plot)
    model = describe(path)
    arch = model.architecture
    routing = None
    if trace is not None:
        routing = read_trace(trace, arch, model.name)
    elif zipf is not None:
        routing = zipf_routing(arch, zipf)
    plan = make_plan(
        model,
        find_gpu(gpu),
        gpus,
        context=context,
        batch=batch,
        weights=weight_format(dtype or model.weights),
        cache=kv_dtype or "",
        routing=routing,
        mode=ep_mode,
        redundant_experts=redundant_experts,
        assumptions=Assumptions(**dict(assume)),
    )
    if plot is not None:
        from moe_export.planning.plot import plot_plan

        plot_plan(plan, plot)
    if as_json:
        print_json(plan.to_dict())
    else:
        click.echo(plan_text(plan))
