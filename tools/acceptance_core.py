"""The logic of ``tools/gpu_acceptance.py``: which checks run, each in its own process, and their report."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_export.errors import UsageError, choices_text

Status = Literal["passed", "failed", "error", "skipped"]
EXIT_PASSED, EXIT_FAILED, EXIT_SKIPPED = 0, 1, 3
_MARKS = {"passed": "✓", "failed": "✗", "error": "!", "skipped": "–"}


@dataclass(frozen=True)
class Machine:
    """What checks may need and this machine has; ``lacks`` says for the rest why, and how to get it."""

    has: Mapping[str, str]
    lacks: Mapping[str, str]
    sms: tuple[int, ...] = ()
    """Compute capability times ten of each GPU, without repeats."""


@dataclass(frozen=True)
class Check:
    """One thing to find out. Risks come before targets.

    ``command``: a child process whose last line is JSON with ``passed`` and anything worth reporting."""

    name: str
    group: Literal["risk", "target"]
    title: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    sm: int | None = None
    timeout: float = 1800.0
    gpu: int | None = None
    """Number of the GPU it runs on; the only one its process sees."""


@dataclass(frozen=True)
class Outcome:
    """What became of a check. ``reason`` is empty only when it passed."""

    name: str
    group: str
    title: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


def gpu_sms() -> list[int]:
    """SM of each GPU that this process sees, asked of the driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        parts = []
        driver.cuDeviceGet(ctypes.byref(device), index)
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            parts.append(value.value)
        found.append(10 * parts[0] + parts[1])
    return found


def rank_gpus(sm: int, sms: Sequence[int] | None = None) -> tuple[int, ...]:
    """Numbers of the first two GPUs of an SM (``sms``: of each GPU; None: asked); empty where there are
    fewer."""
    found = [index for index, each in enumerate(gpu_sms() if sms is None else sms) if each == sm]
    return tuple(found[:2]) if len(found) > 1 else ()


def select(checks: Sequence[Check], only: Sequence[str], sms: Sequence[int]) -> list[Check]:
    """The checks asked for (all, when ``only`` is empty), risks first.

    Raises:
        UsageError: no check has that name or is for that SM, or no check is left.
    """
    names = {c.name for c in checks} | {c.name.split("/")[0] for c in checks}
    for name in only:
        if name not in names:
            raise UsageError(f"--only: unknown check {name!r}; {choices_text(name, names)}")
    known = sorted({c.sm for c in checks if c.sm is not None})
    for sm in sms:
        if sm not in known:
            listed = ", ".join(str(n) for n in known) or "none"
            raise UsageError(f"--sm: no check is for SM{sm} here; choices: {listed}")
    kept = [
        c
        for c in checks
        if (not only or c.name in only or c.name.split("/")[0] in only)
        and (not sms or c.sm is None or c.sm in sms)
    ]
    if not kept:
        raise UsageError("--only and --sm leave no check")
    return sorted(kept, key=lambda c: c.group != "risk")


def run_checks(
    checks: Sequence[Check], machine: Machine, told: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Run every check whose needs the machine meets; one that fails stops no other."""
    outcomes = []
    for check in checks:
        missing = [n for n in check.needs if n not in machine.has]
        if missing:
            reason = "; ".join(machine.lacks.get(n, f"{n} is missing") for n in missing)
            outcome = Outcome(check.name, check.group, check.title, "skipped", reason)
        elif check.sm is not None and check.sm not in machine.sms:
            found = ", ".join(f"SM{s}" for s in machine.sms) or "none"
            reason = f"needs a GPU of SM{check.sm}; this machine has {found}"
            outcome = Outcome(check.name, check.group, check.title, "skipped", reason)
        else:
            outcome = run_child(check)
        outcomes.append(outcome)
        told(outcome)
    return outcomes


def run_child(check: Check) -> Outcome:
    """Run one check in its own process, since a fault on a GPU spoils every later call of its process."""
    begin = time.monotonic()

    def ended(status: Status, reason: str, details: dict[str, Any] | None = None) -> Outcome:
        seconds = round(time.monotonic() - begin, 2)
        return Outcome(check.name, check.group, check.title, status, reason, seconds, details or {})

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            process = subprocess.Popen(check.command, stdout=out, stderr=err, env=_environment(check))
        except OSError as error:
            return ended("error", f"could not be started: {error}")
        try:
            code = process.wait(check.timeout)
        except subprocess.TimeoutExpired:
            return ended("error", f"stopped after {check.timeout:g} s")
        finally:
            if process.poll() is None:
                _stop(process)
        out.seek(0)
        err.seek(0)
        lines, told = out.read().splitlines(), err.read().strip().splitlines()
    tail = " | ".join(told[-3:]) or "nothing on stderr"
    if code < 0:
        return ended("error", f"killed by signal {-code}: {tail}")
    try:
        result = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        result = None
    if not isinstance(result, dict) or not isinstance(result.get("passed"), bool):
        return ended("error", f"exit code {code} without a result: {tail}")
    details = {k: v for k, v in result.items() if k not in ("passed", "reason")}
    if not result["passed"]:
        return ended("failed", str(result.get("reason") or f"no reason given; {tail}"), details)
    if code:
        return ended("error", f"said passed, but its exit code is {code}: {tail}", details)
    return ended("passed", "", details)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a check and what it started: a build left behind would use the GPU while the next is timed."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def _environment(check: Check) -> dict[str, str]:
    chosen = (
        {}
        if check.gpu is None
        else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(check.gpu)}
    )
    return {**os.environ, **chosen}


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 when a check failed or broke; else 3 when one was skipped, since nothing was shown for it; else 0."""
    statuses = {o.status for o in outcomes}
    if statuses & {"failed", "error"}:
        return EXIT_FAILED
    return EXIT_PASSED if statuses == {"passed"} else EXIT_SKIPPED


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line: how many of each."""
    counts = {s: sum(o.status == s for o in outcomes) for s in ("passed", "failed", "error", "skipped")}
    return ", ".join(f"{n} {s}" for s, n in counts.items())


def line(outcome: Outcome) -> str:
    """One outcome for the terminal."""
    reason = f": {outcome.reason}" if outcome.reason else f" ({outcome.seconds:g} s)"
    return f"{_MARKS[outcome.status]} {outcome.name}: {outcome.status}{reason}"


def make_folder(folder: Path) -> None:
    """Make the report's folder, before checks take their time.

    Raises:
        UsageError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output {folder}: {error.strerror or error}") from None


def write_report(folder: Path, machine: Machine, outcomes: Sequence[Outcome]) -> tuple[Path, Path]:
    """``acceptance.json`` and ``acceptance.md`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "summary": summary(outcomes),
        "exit_code": exit_code(outcomes),
        "python": sys.version.split()[0],
        "machine": {"has": dict(machine.has), "lacks": dict(machine.lacks), "sms": list(machine.sms)},
        "checks": [asdict(o) for o in outcomes],
    }
    as_json, as_markdown = folder / "acceptance.json", folder / "acceptance.md"
    as_json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    as_markdown.write_text(markdown(machine, outcomes), encoding="utf-8")
    return as_json, as_markdown


def markdown(machine: Machine, outcomes: Sequence[Outcome]) -> str:
    """The report for people: what did not pass first, then everything, then what was skipped and why."""
    lines = ["# GPU acceptance", "", f"**{summary(outcomes)}**", ""]
    lines += [f"- {name}: {text}" for name, text in machine.has.items()]
    lines += [f"- no {name}: {text}" for name, text in machine.lacks.items()]
    bad = [o for o in outcomes if o.status in ("failed", "error")]
    if bad:
        lines += ["", "## Failed", ""] + [f"- **{o.name}** ({o.status}): {o.reason}" for o in bad]
    for group, title in (("risk", "Risks"), ("target", "Targets")):
        rows = [o for o in outcomes if o.group == group]
        if rows:
            lines += [
                "",
                f"## {title}",
                "",
                "| check | what | result | s | measured |",
                "|---|---|---|---|---|",
            ]
            lines += [_row(o) for o in rows]
    skipped = [o for o in outcomes if o.status == "skipped"]
    if skipped:
        lines += ["", "## Skipped: nothing is shown for these", ""]
        for reason in dict.fromkeys(o.reason for o in skipped):
            lines.append(f"- {reason}: {', '.join(o.name for o in skipped if o.reason == reason)}")
    return "\n".join(lines) + "\n"


def _row(outcome: Outcome) -> str:
    told = "; ".join(f"{k} {_short(v)}" for k, v in outcome.details.items())
    cells = (outcome.name, outcome.title, outcome.status, f"{outcome.seconds:g}", told or outcome.reason)
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value)
