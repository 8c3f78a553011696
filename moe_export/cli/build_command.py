"""``moe-export build``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_export.cli.options import (
    Assignment,
    IntList,
    common_options,
    json_option,
    quiet_option,
    resume_option,
    trust_remote_code_option,
)
from moe_export.config import (
    EXPERT_LOWERINGS,
    NATIVE_LOWERINGS,
    QUANTIZATIONS,
    QUANTIZED_LOWERINGS,
    TARGETS,
    WEIGHTS,
    load_config_file,
    merge,
)
from moe_export.schema import DTYPES, EP_MODES, EP_OVERFLOWS, PLACEMENTS, TASKS

if TYPE_CHECKING:
    from moe_export.bundle import Bundle


@click.command("build", short_help="Build an engine: export, lower, build, verify, bench.")
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--target", type=click.Choice(TARGETS), help="What the engine runs on.  [default: onnxruntime]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Number format of the engine.  [default: float32]")
@click.option("--task", type=click.Choice(TASKS), help="What the model is for.  [default: from the model]")
@click.option("--verify/--no-verify", default=None, help="Check parity after the build.  [default: verify]")
@click.option("--bench/--no-bench", default=None, help="Measure speed after the build.  [default: bench]")
@click.option("--max-batch", type=click.IntRange(1), help="Largest batch the engine accepts.")
@click.option("--max-seq", type=click.IntRange(1), help="Largest length in tokens, cached and new.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file; flags win.")
@click.option(
    "--expert-lowering", type=click.Choice(EXPERT_LOWERINGS),
    help="How experts are lowered (GPU targets: native or plugin).  [default: auto, chosen per layer]",
)  # fmt: skip
@click.option(
    "--native-lowering", type=click.Choice(NATIVE_LOWERINGS),
    help="TensorRT's own form of the experts.  [default: auto, by predicted times, per layer]",
)  # fmt: skip
@click.option("--sm", type=IntList(), help="GPUs of a TensorRT target: 80,89,120.  [default: the GPU here]")
@click.option(
    "--quantize",
    type=click.Choice(QUANTIZATIONS),
    help="Store expert weights in blocks of integers.  [default: floats]",
)
@click.option(
    "--quantized-lowering", type=click.Choice(QUANTIZED_LOWERINGS),
    help="Op for quantised experts: ONNX Runtime's or the plugin's.  [default: auto, the faster]",
)  # fmt: skip
@click.option("--ep", type=click.IntRange(1), help="Ranks that share the experts.  [default: 1]")
@click.option(
    "--ep-mode", type=click.Choice(EP_MODES),
    help="How ranks exchange tokens.  [default: allreduce, which takes every task and batch]",
)  # fmt: skip
@click.option(
    "--ep-overflow", type=click.Choice(EP_OVERFLOWS),
    help="When a block of an all-to-all is too small: enlarge it, or end with an error.  [default: exact]",
)  # fmt: skip
@click.option("--ep-capacity-factor", type=float, help="Rows of such a block over its even share.")
@click.option(
    "--placement", type=click.Choice(PLACEMENTS),
    help="Which rank holds which experts: in order, or balanced by --trace.  [default: contiguous]",
)  # fmt: skip
@click.option("--trace", metavar="FILE", help="Expert load as `moe-export trace --json FILE` counted it.")
@click.option(
    "--redundant-experts", type=click.IntRange(0),
    help="Replicas of busy experts per MoE layer, over all ranks.  [default: 0]",
)  # fmt: skip
@click.option("--ep-nodes", type=click.IntRange(1), help="Machines that the ranks lie on.  [default: 1]")
@click.option(
    "--weights", type=click.Choice(WEIGHTS),
    help="stream: read weights one by one, needs --no-verify; load: all first.  [default: auto, stream from "
    "2 GiB on]",
)  # fmt: skip
@click.option("--layers", type=click.IntRange(1), help="Only the first N layers, a trial.  [default: all]")
@click.option("--opset", type=int, help="ONNX opset.  [default: 20]")
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine.  [default: all cores]")
@click.option("--seed", type=click.IntRange(0), help="Seed of every random input.  [default: 0]")
@click.option(
    "--tolerance", "tolerances", type=Assignment(), multiple=True, help="Largest error of an output."
)
@click.option("--overwrite/--no-overwrite", default=None, help="Replace a bundle there.  [default: refuse]")
@resume_option
@trust_remote_code_option
@json_option
@quiet_option
@common_options
def command(
    source: str, output: Path, config_file: Path | None, as_json: bool, quiet: bool, **flags: Any
) -> int:
    """Build an engine from SOURCE: export, lower, build, verify, bench. One bundle with its evidence.

    SOURCE is a Hugging Face model folder, or path/file.py:function that returns a torch module.
    """
    flags["max_sequence"] = flags.pop("max_seq")
    flags["tolerances"] = dict(flags["tolerances"]) or None
    flags["trust_remote_code"] = flags["trust_remote_code"] or None
    resume = flags.pop("resume")
    config = merge(load_config_file(config_file) if config_file else {}, flags)

    from moe_export.api import build
    from moe_export.cli.output import print_json
    from moe_export.cli.progress import console_progress
    from moe_export.schema import to_json

    with console_progress(quiet) as progress:
        bundle = build(source, output, config, resume=resume, progress=progress)
    if as_json:
        print_json({"path": str(bundle.path), "manifest": to_json(bundle.manifest)})
    else:
        trial = filter(None, [bundle.manifest.source.trial])
        click.echo("\n".join([f"built {bundle.path}", *trial, *_plans(bundle), *_evidence(bundle)]))
    if bundle.manifest.state == "needs-gpu-build":
        from moe_export.backends.trt.build_engine import UNFINISHED
        from moe_export.errors import EnvironmentLacksError

        raise EnvironmentLacksError(
            next(note for note in bundle.manifest.notes if note.startswith(UNFINISHED))
        )
    return 0


def _plans(bundle: Bundle) -> Iterator[str]:
    """What was built for which GPU."""
    for engine in bundle.manifest.engines:
        yield (
            f"{engine.file}: SM{engine.sm}, {engine.library} {engine.version}, {engine.layers} layers, "
            "weights "
            f"{engine.weight_bytes / 2**20:.1f} MiB, activations {engine.activation_bytes / 2**20:.1f} MiB "
            "at most"
        )
    yield from (n for n in bundle.manifest.notes if n.startswith(("not verified", "not measured")))


def _quantized(bundle: Bundle) -> Iterator[str]:
    """What of the experts is quantised, and why the rest is not."""
    chosen = [d for d in bundle.manifest.decisions if d.subject.endswith(": experts")]
    kind = bundle.manifest.quantization
    floats = [d for d in chosen if d.choice.startswith("not int")]
    if kind is not None:
        layers = len(bundle.manifest.moe_layers)
        yield f"experts: {kind} in {layers - len(floats)} of {layers} layers"
    if floats:
        yield f"left in float: {len(floats)} layer(s), the first {floats[0].subject}: {floats[0].reason}"
    yield from (note for note in bundle.manifest.notes if "was asked for, and" in note)


def _evidence(bundle: Bundle) -> Iterator[str]:
    """What the build found out, in a line each; a bundle without evidence has none."""
    yield from _quantized(bundle)
    parity, bench = (bundle.manifest.evidence.get(name) for name in ("parity", "bench"))
    if isinstance(parity, dict):
        error, routes = parity.get("relative_error"), parity.get("route_agreement")
        forced, change = parity.get("forced_error"), parity.get("cross_entropy_change")
        words = [f"{parity.get('cases')} cases"]
        if parity.get("quantization") and forced is not None:
            words.append(f"largest relative error with routing forced {forced:.1e}")
        elif error is not None:
            words.append(f"largest relative error {error:.1e}")
        words += [] if routes is None else [f"the same experts for {100 * routes:.2f} % of tokens"]
        if parity.get("quantization") and change is not None:
            words.append(f"cross-entropy on text changed by at most {change:.4f} nats")
        how = " (simulated on the CPU, not run on a GPU)" if parity.get("simulated") else ""
        yield f"verified{how}: {', '.join(words)}"
    if isinstance(bench, dict):
        for other, name in (("vs_eager", "PyTorch eager"), ("vs_best", "the fastest alternative")):
            ratios = {phase: x for phase, x in (bench.get(other) or {}).items() if x is not None}
            if ratios:
                text = ", ".join(f"{phase} {x:.2f}x" for phase, x in ratios.items())
                noisy = " (measured beside other busy processes)" if bench.get("noisy") else ""
                yield f"speed against {name}: {text}{noisy}"
    report = bundle.path / "evidence" / "report.html"
    if report.is_file():
        yield f"report: {report}"
