"""Everything about GPUs that a machine without one cannot show, as one command for a machine with one.

    python tools/gpu_acceptance.py                        all checks, report in gpu-acceptance/
    python tools/gpu_acceptance.py --list                 the checks, and nothing else
    python tools/gpu_acceptance.py --only marshalling,shared-memory

First the risks: that kernels get their arguments, more than 48 KiB of shared memory, numbers of tensor cores,
and plans that need nothing of moe-export. Then whole engines: built, checked against PyTorch, and timed, for
every target, dtype and expert lowering, on one GPU of each SM that is here; and two ranks where there are two
GPUs of an SM. Each check is a process of its own. Ends with 0 only if everything ran and passed; 1: something
failed; 3: nothing failed, but something was skipped (the report says what and why).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from acceptance_core import (
    Check,
    Machine,
    exit_code,
    gpu_sms,
    line,
    make_folder,
    rank_gpus,
    run_checks,
    select,
    summary,
    write_report,
)

from moe_export.backends.trt.backend import FIRST_COLLECTIVE_SM
from moe_export.backends.trt.library import INSTALL, MODULES, library_problem, library_version
from moe_export.backends.trt.machine import lowerings_of
from moe_export.backends.trt.nccl import Nccl
from moe_export.errors import EnvironmentLacksError, MoeExportError, UsageError
from moe_export.schema import DTYPES, EP_MODES
from moe_export.sms import FIRST_SM, SMS, sms_of

RUNNER = Path(__file__).with_name("acceptance_plans.py")
GPU_EXTRA = "pip install 'moe-export[gpu]'"


def look() -> tuple[Machine, dict[int, int]]:
    """What this machine has of what checks need, and its GPUs: number of the first one by SM."""
    has: dict[str, str] = {}
    lacks: dict[str, str] = {}
    gpus = find_gpus()
    if gpus:
        has["gpu"] = ", ".join(f"GPU {index}: SM{sm}" for sm, index in gpus.items())
    else:
        lacks["gpu"] = "no NVIDIA GPU, or no driver for it"
    for name, package in (("triton", "triton"), ("cuda", "cuda.bindings")):
        if _installed(package):
            has[name] = "installed"
        else:
            lacks[name] = f"{package} is not installed: {GPU_EXTRA}"
    if _installed("mpi4py"):
        has["mpi"] = "installed"
    else:
        lacks["mpi"] = "mpi4py is not installed: pip install 'moe-export[mpi]'"
    try:
        Nccl()
        has["nccl"] = "installed"
    except EnvironmentLacksError as error:
        lacks["nccl"] = str(error)
    for sm in SMS:
        pair = rank_gpus(sm)
        if pair:
            has[_two(sm)] = f"GPUs {pair[0]} and {pair[1]}"
        elif sm in gpus:
            lacks[_two(sm)] = f"ranks need two GPUs of SM{sm}, and this machine has one"
        else:
            lacks[_two(sm)] = f"no two GPUs of SM{sm}"
    for target, module in MODULES.items():
        problem = library_problem(target)
        if problem:
            lacks[module] = problem if INSTALL[target] in problem else f"{problem}: {INSTALL[target]}"
        else:
            has[module] = str(library_version(target))
    return Machine(has, lacks, tuple(gpus)), gpus


def _two(sm: int) -> str:
    return f"two GPUs of SM{sm}"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def find_gpus() -> dict[int, int]:
    """SM → number of the first GPU that has it."""
    found: dict[int, int] = {}
    for index, sm in enumerate(gpu_sms()):
        found.setdefault(sm, index)
    return found


RISKS = (
    ("marshalling", "each kernel's arguments, against Triton's interpreter", ()),
    ("shared-memory", "more than 48 KiB of shared memory", ()),
    ("tensor-cores", "whole layers on tensor cores, against float64", ()),
    ("bare-plan", "a plan run with nothing of moe-export", ("tensorrt",)),
)
"""Name, what, and needs beyond a GPU and what kernels take."""


def all_checks(machine: Machine, source: str, speedup: float) -> list[Check]:
    """Every check. Without a GPU, targets are listed for every SM, so that the report names what is left."""
    checks = []
    for name, title, more in RISKS:
        needs = ("gpu", "triton", "cuda", *more)
        for sm in machine.sms or (None,):
            own = name if sm is None else f"{name}/sm{sm}"
            checks.append(_check(own, "risk", title, needs, (name,), sm))
    for target, module in MODULES.items():
        for sm in machine.sms or sms_of(target):
            if sm not in sms_of(target):
                continue
            for lowering in lowerings_of(sm):
                for dtype in DTYPES:
                    if sm >= FIRST_SM[target][dtype]:
                        name = f"{target}/{lowering}/{dtype}/sm{sm}"
                        words = ("target", target, lowering, dtype, str(sm), source, str(speedup))
                        title = f"build, parity and speed of {source}"
                        needs = ("gpu", "cuda", module, *(("triton",) if lowering == "plugin" else ()))
                        checks.append(_check(name, "target", title, needs, words, sm))
            for mode in EP_MODES if sm >= FIRST_COLLECTIVE_SM else ():
                name = f"ranks/{target}/{mode}/sm{sm}"
                needs = ("gpu", _two(sm), "cuda", "mpi", "nccl", module)
                title = f"two ranks of {source} under mpiexec, against the source model"
                given = ("ranks", target, mode, str(sm), source)
                checks.append(_check(name, "target", title, needs, given, sm))
    return checks


def _check(
    name: str,
    group: Literal["risk", "target"],
    title: str,
    needs: tuple[str, ...],
    words: tuple[str, ...],
    sm: int | None,
) -> Check:
    return Check(name, group, title, needs, (sys.executable, str(RUNNER), *words), sm)


def _sms(text: str) -> list[int]:
    parts = text.split(",") if text else []
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected SMs with commas between, such as 80,89")
    return [int(part) for part in parts]


def _speedup(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number above 0")
    return found


def _check_source(source: str) -> None:
    if not Path(source).exists():
        raise UsageError(f"--source {source}: there is no such file or folder; name a model's folder")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="checks by name or first part, comma-separated")
    parser.add_argument("--sm", type=_sms, default=[], help="engines for these SMs only, comma-separated")
    parser.add_argument("--source", default="examples/byte-mixtral", help="model to build engines of")
    parser.add_argument(
        "--min-speedup", type=_speedup, default=1.0, help="over PyTorch eager, of every workload"
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-acceptance"), help="folder of the report")
    parser.add_argument("--list", action="store_true", help="print the checks and what each needs")
    given = parser.parse_args(arguments)
    found, gpus = look()
    try:
        only = given.only.split(",") if given.only else []
        every = select(all_checks(found, given.source, given.min_speedup), only, given.sm)
        # Ranks choose their GPUs themselves.
        checks = [c if "ranks" in c.command else replace(c, gpu=gpus.get(c.sm or 0)) for c in every]
        if any(c.group == "target" for c in checks):
            _check_source(given.source)
        if not given.list:
            make_folder(given.output)
    except MoeExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if given.list:
        for check in checks:
            print(f"{check.name}: {check.title} (needs {', '.join(check.needs)})")
        return 0
    _print_machine(found.has, found.lacks)
    outcomes = run_checks(checks, found, lambda outcome: print(line(outcome), flush=True))
    written = write_report(given.output, found, outcomes)
    print(f"{summary(outcomes)}; report: {', '.join(str(p) for p in written)}")
    return exit_code(outcomes)


def _print_machine(has: Mapping[str, str], lacks: Mapping[str, str]) -> None:
    for name, text in has.items():
        print(f"{name}: {text}")
    for name, text in lacks.items():
        print(f"no {name}: {text}")


if __name__ == "__main__":
    sys.exit(main())
