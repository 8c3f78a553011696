"""How the ranks of a run meet: each says what it is there for and which bundle it has, and all learn alike
whether that fits together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_export.backends.onnxruntime.runner import default_threads
from moe_export.bundle.manifest import MANIFEST_NAME
from moe_export.bundle.reader import open_manifest
from moe_export.errors import BundleError, MoeExportError, UsageError
from moe_export.files import sha256_file
from moe_export.runtime.launch import launched, mpiexec_command, timeout_seconds
from moe_export.runtime.ranks import Ranks, connect, connected, problems_text
from moe_export.schema import ExpertParallel, Manifest
from moe_export.sms import GPU_TARGETS

DRIVE, SERVE = "drive", "serve"
"""What a process is there for: rank 0 drives, the others serve it."""


@dataclass(frozen=True)
class Joined:
    """Ranks that have met over one bundle. ``statuses``: what each said."""

    ranks: Ranks
    parallel: ExpertParallel
    statuses: tuple[Mapping[str, Any], ...]

    def threads(self, given: int | None) -> int | None:
        """Threads of this rank: what was given, or its cores divided by the ranks that share them."""
        return given if given is not None else max(default_threads() // self._sharers(), 1)

    def choose_gpu(self, manifest: Manifest) -> None:
        """For a bundle of plans: let this rank see a GPU of its own, one after the other on each host.

        Raises:
            EnvironmentLacksError: the host shows fewer GPUs than it has ranks.
        """
        if manifest.target in GPU_TARGETS:
            from moe_export.backends.trt.nccl import choose_gpu

            hosts = [status["host"] for status in self.statuses]
            choose_gpu(hosts[: self.ranks.rank].count(hosts[self.ranks.rank]))

    def notes(self, given: int | None) -> list[str]:
        """Lines that a user should know."""
        mode, size = self.parallel.mode, self.ranks.size
        hosts = len({status["host"] for status in self.statuses})
        lines = [
            f"{size} ranks on {hosts} host(s), exchange {mode}, time limit {self.ranks.timeout:g} s"
        ]
        if given is None and self._sharers() > 1:
            lines.append(
                f"{self._sharers()} ranks share this host's {default_threads()} core(s): "
                f"{self.threads(None)} thread(s) each; --threads sets another number"
            )
        return lines

    def _sharers(self) -> int:
        """Ranks that may run on this rank's cores, this one included."""
        own = self.statuses[self.ranks.rank]
        cores = set(own["cores"])
        return sum(s["host"] == own["host"] and bool(cores & set(s["cores"])) for s in self.statuses)


def join_ranks(path: str | os.PathLike[str], role: str, timeout: float | None) -> Joined | None:
    """Meet the other ranks; None for a bundle of one rank in a process that was started alone.

    Raises:
        UsageError: the number of ranks or this process's role is wrong.
        BundleError: the ranks have no bundle, or different ones.
        EnvironmentLacksError: there is no MPI here.
    """
    seconds = timeout_seconds(timeout)
    if not needs_ranks(path):
        if role == SERVE:
            raise UsageError(
                f"this process serves no one: {path} has one rank, and there is no mpiexec; call load()"
            )
        return None
    ranks = connect(seconds)
    return _meet(ranks, path, role, "")


def needs_ranks(path: str | os.PathLike[str]) -> bool:
    """Whether the bundle ``path`` is run by the ranks of this run, rather than by this process alone.

    Raises:
        UsageError: it has several ranks, and this process was started alone.
        BundleError: it is no bundle (where this process was started alone; ranks say it when they meet).
    """
    if launched().size > 1:
        return True
    parallel = open_manifest(path).expert_parallel
    if parallel is not None:
        raise UsageError(_count_text(path, parallel.ranks, "this process was started alone"))
    return False


def refuse_ranks(path: str | os.PathLike[str], error: BaseException, timeout: float | None) -> None:
    """Tell the other ranks, who wait for this one, that it will not come. Does nothing when they have met."""
    ranks = connected()
    if launched().size == 1 or (ranks is not None and ranks.met):
        return
    told = str(error) if isinstance(error, MoeExportError) else f"{type(error).__name__}: {error}"
    try:
        _meet(connect(timeout_seconds(timeout)), path, DRIVE, told or "it was interrupted")
    except MoeExportError:
        return  # What all are told; the caller raises its own error.


def _meet(ranks: Ranks, path: str | os.PathLike[str], role: str, problem: str) -> Joined:
    status = {**_status(ranks, path), "role": role}
    status["problem"] = problem or status["problem"]
    statuses = ranks.exchange(status)
    ranks.met = True
    ranks.timeout = float(statuses[0]["timeout"])
    _judge(statuses, path)
    return Joined(ranks, ExpertParallel(**{**status["parallel"], "layers": ()}), tuple(statuses))


def _status(ranks: Ranks, path: str | os.PathLike[str]) -> dict[str, Any]:
    from moe_export import __version__

    status: dict[str, Any] = {
        "host": ranks.host,
        "version": __version__,
        "timeout": ranks.timeout,
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0],
        "pid": os.getpid(),
        "problem": "",
        "bundle": "",
        "parallel": None,
    }
    try:
        parallel = open_manifest(path).expert_parallel
        status["bundle"] = sha256_file(Path(path) / MANIFEST_NAME)
    except BundleError as error:
        status["problem"] = str(error)
    else:
        if parallel is not None:
            fields = ("ranks", "mode", "overflow", "capacity_factor", "placement", "redundant_experts")
            status["parallel"] = {name: getattr(parallel, name) for name in fields}
    return status


def _judge(statuses: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Raise the same error on every rank where they do not fit together."""
    problem = problems_text(statuses)
    if problem:
        raise BundleError(problem)
    first = statuses[0]
    for rank, status in enumerate(statuses):
        who = f"rank {rank} ({status['host']})"
        role = DRIVE if rank == 0 else SERVE
        if status["role"] != role:
            called = "load()" if status["role"] == DRIVE else "serve_rank()"
            raise UsageError(
                f"{who} called {called}; rank 0 calls moe_export.runtime.load(), every other rank "
                "moe_export.runtime.serve_rank()"
            )
        if status["version"] != first["version"]:
            raise UsageError(
                f"{who} has moe-export {status['version']}, rank 0 ({first['host']}) has {first['version']}; "
                "install the same on all hosts"
            )
        if status["bundle"] != first["bundle"]:
            raise BundleError(
                f"{who} has another bundle than rank 0 ({first['host']}): SHA-256 of {MANIFEST_NAME} is "
                f"{status['bundle'][:12]}… instead of {first['bundle'][:12]}…; copy one bundle to all hosts"
            )
    started = f"mpiexec started {len(statuses)} processes"
    if first["parallel"] is None:
        raise UsageError(
            f"bundle {path} has one rank, but {started}; run it without mpiexec, or build one of "
            f"{len(statuses)} ranks with --ep {len(statuses)}"
        )
    if first["parallel"]["ranks"] != len(statuses):
        raise UsageError(_count_text(path, first["parallel"]["ranks"], started))


def _count_text(path: str | os.PathLike[str], ranks: int, started: str) -> str:
    return f"bundle {path} has {ranks} ranks, but {started}; run: {mpiexec_command(ranks, path)}"
