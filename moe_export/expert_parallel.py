"""From what a build is asked to how a model is divided over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from .config import BuildConfig
from .errors import UsageError
from .schema import Decision, ExpertParallel, ModelIO, MoELayer


class ExpertCount(Protocol):
    """What is known of an MoE layer before it is exported."""

    @property
    def name(self) -> str: ...

    @property
    def num_experts(self) -> int: ...


def check_ranks(config: BuildConfig, layers: Iterable[ExpertCount]) -> None:
    """Refuse what :func:`divide` would refuse, as far as it is known before the model is traced.

    Raises:
        UsageError: no experts, fewer of them than ranks, or a file that is no trace.
    """
    if config.ep == 1:
        return
    found = list(layers)
    if not found:
        raise UsageError(f"ep: {config.ep} ranks were asked for, and the model has no MoE layer to divide")
    for layer in found:
        if config.ep > layer.num_experts + config.redundant_experts:
            raise UsageError(
                f"ep: {config.ep} ranks for the {layer.num_experts} experts of MoE layer {layer.name!r}, so "
                f"a rank would have none; take at most {layer.num_experts}, or placement balanced with "
                "redundant_experts"
            )
    if config.trace is not None:
        from .placement import read_load_trace

        read_load_trace(Path(config.trace))


def divide(
    config: BuildConfig, task: str, io: ModelIO, layers: Sequence[MoELayer]
) -> tuple[ExpertParallel | None, tuple[Decision, ...]]:
    """The division that ``config`` asks for and what was decided on the way; None for one rank.

    Raises:
        UsageError: the model has no experts or too few, its inputs cannot be divided, or the trace is of
            another model.
    """
    if config.ep == 1:
        return None, ()
    from .placement import placement_from_config

    if not layers:
        raise UsageError(f"ep: {config.ep} ranks were asked for, and the model has no MoE layer to divide")
    if config.ep_mode == "alltoall":
        _check_rows(task, io)
    placed, decisions = placement_from_config(config, layers)
    plan = ExpertParallel(
        ranks=config.ep,
        mode="alltoall" if config.ep_mode == "alltoall" else "allreduce",
        overflow="error" if config.ep_overflow == "error" else "exact",
        capacity_factor=config.ep_capacity_factor,
        placement="balanced" if config.placement == "balanced" else "contiguous",
        redundant_experts=config.redundant_experts,
        layers=placed,
    )
    return plan, decisions


def _check_rows(task: str, io: ModelIO) -> None:
    """Sequences are dealt out over the ranks, so every input and output must have them first."""
    for spec in (*io.inputs, *io.outputs):
        if task == "module" or not spec.shape or spec.shape[0] != "batch":
            raise UsageError(
                f"ep_mode: alltoall divides sequences over the ranks, and {spec.name!r} {list(spec.shape)} "
                f"of this {task} model has no batch axis first; take allreduce"
            )
