"""``moe-export doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from moe_export.cli.options import common_options, json_option
from moe_export.config import TARGETS
from moe_export.errors import EnvironmentLacksError
from moe_export.sms import GPU_TARGETS

if TYPE_CHECKING:
    from moe_export.inspect.environment import Environment, TargetStatus


@click.command("doctor", short_help="Show what is installed and what each target lacks.")
@click.option("--target", type=click.Choice(TARGETS), help="Ask about this target only for the exit code.")
@json_option
@common_options
def command(target: str | None, as_json: bool) -> None:
    """Show what is installed and what each target lacks, with how to get it.

    Exits with 3 when a target of the CPU, or the one that --target names, cannot be built for and run on
    this machine.
    """
    from moe_export.cli.output import print_json
    from moe_export.inspect.environment import examine

    environment = examine()
    if as_json:
        print_json(environment.to_dict())
    else:
        click.echo(_text(environment))
    asked = [
        t for t in environment.targets if t.name == target or (target is None and t.name not in GPU_TARGETS)
    ]
    missing = [t for t in asked if not t.available]
    if missing:
        raise EnvironmentLacksError(f"target {missing[0].name} lacks {'; '.join(missing[0].lacks)}")


def _text(environment: Environment) -> str:
    from moe_export.cli.output import gibibytes, table

    cpu, memory = environment.cpu, environment.memory
    features = "features unknown" if cpu["features"] is None else " ".join(cpu["features"])
    lines = [
        f"moe-export {environment.moe_export}, Python {environment.python}, {environment.platform}",
        f"CPU: {cpu['model']}; {cpu['usable_cores']} of {cpu['logical_cores']} cores usable; {features}",
    ]
    if memory:
        limit = memory.get("container_limit")
        limit_text = f", container limit {gibibytes(limit)}" if limit else ""
        lines.append(
            f"memory: {gibibytes(memory['total'])}, {gibibytes(memory['available'])} available{limit_text}"
        )
    if environment.execution_providers:
        lines.append(f"ONNX Runtime providers in this build: {', '.join(environment.execution_providers)}")
    plugin = environment.cpu_plugin
    lines.append(f"CPU plugin: {plugin['path'] if plugin['problem'] is None else plugin['problem']}")
    gpu = environment.gpu
    lines.append(f"NVIDIA GPU: SM{gpu['sm']}, driver for CUDA {gpu['cuda']}" if gpu else "NVIDIA GPU: none")
    rows = [
        (p.name, p.version or "missing", p.used_for, p.problem or ("" if p.version else p.install))
        for p in environment.packages
    ]
    lines += ["", table(("package", "version", "used for", "what to do"), rows), ""]
    target_rows = [
        (
            t.name,
            _status(t),
            "; ".join(t.lacks),
        )
        for t in environment.targets
    ]
    lines.append(table(("target", "status", "lacks"), target_rows))
    lines += [f"warning: {text}" for text in environment.warnings]
    return "\n".join(lines)


def _status(target: TargetStatus) -> str:
    if target.available:
        return "available"
    return "runs engines only" if target.runs else "builds engines only" if target.builds else "missing"
