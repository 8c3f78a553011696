"""From work to predicted time: a kernel takes what its slower side takes, plus a fixed start-up."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from moe_export.costs.gpus import Gpu
from moe_export.costs.work import Work
from moe_export.errors import UsageError

BOUNDS = ("memory", "compute", "exchange", "overhead")


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet tells. Shares of the sheet's peaks that kernels reach, and fixed times in seconds.

    They are assumptions, not measurements: no GPU was at hand. ``usable_memory`` is the share of a GPU's
    memory for weights and cache; the rest is for activations, workspaces and the runtime.
    """

    compute: float = 0.7
    memory: float = 0.8
    link: float = 0.8
    kernel_s: float = 2e-6
    exchange_s: float = 10e-6
    usable_memory: float = 0.9

    def __post_init__(self) -> None:
        for name in ("compute", "memory", "link", "usable_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected a share above 0, at most 1")
        for name in ("kernel_s", "exchange_s"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; expected 0 seconds or more")

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Time:
    """Predicted seconds by what bounds them: memory, compute, exchange between GPUs, start-up."""

    memory: float = 0.0
    compute: float = 0.0
    exchange: float = 0.0
    overhead: float = 0.0

    @property
    def seconds(self) -> float:
        return self.memory + self.compute + self.exchange + self.overhead

    @property
    def bound(self) -> str:
        """What takes the largest part."""
        return max(BOUNDS, key=lambda name: (getattr(self, name), -BOUNDS.index(name)))

    def __add__(self, other: Time) -> Time:
        return Time(*(getattr(self, name) + getattr(other, name) for name in BOUNDS))

    def __mul__(self, factor: float) -> Time:
        return Time(*(getattr(self, name) * factor for name in BOUNDS))

    def to_dict(self) -> dict[str, float | str]:
        """Plain JSON values, in seconds."""
        parts = {f"{name}_s": getattr(self, name) for name in BOUNDS}
        return {"seconds": self.seconds, "bound": self.bound, **parts}


def predict(work: Work, gpu: Gpu, compute: str, assumptions: Assumptions, launches: int = 1) -> Time:
    """Predicted time of ``work`` done by ``launches`` kernels one after the other on one GPU."""
    arithmetic = work.flops / (gpu.peak(compute) * assumptions.compute)
    traffic = work.bytes / (gpu.bandwidth * assumptions.memory)
    overhead = launches * assumptions.kernel_s
    if arithmetic > traffic:
        return Time(compute=arithmetic, overhead=overhead)
    return Time(memory=traffic, overhead=overhead)
