"""Which workloads are measured: phases × batch × sequence × routing, within what the engine accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError, choices_text
from ..schema import Manifest
from .routing import ROUTINGS


@dataclass(frozen=True)
class Workload:
    """One cell. ``phase``: ``prefill``, ``decode`` or ``forward``; ``sequence``: tokens per row (cached
    ones, in decode)."""

    phase: str
    batch: int
    sequence: int
    routing: str = "real"

    @property
    def tokens(self) -> int:
        """Tokens that one run processes."""
        return self.batch * (1 if self.phase == "decode" else self.sequence)

    @property
    def text(self) -> str:
        """``prefill 1x512``, with the routing where it is not the model's own."""
        return f"{self.phase} {self.batch}x{self.sequence}" + (
            "" if self.routing == "real" else f" {self.routing}"
        )


@dataclass(frozen=True)
class Grid:
    """Workloads in the order they are measured, and (workload, reason) of those left out."""

    workloads: tuple[Workload, ...]
    left_out: tuple[tuple[str, str], ...]


def make_grid(
    manifest: Manifest,
    batch: Sequence[int],
    sequence: Sequence[int],
    decode_tokens: int,
    routing: Sequence[str],
) -> Grid:
    """The workloads that fit the engine's limits.

    With a KV cache: prefill and decode; without: forward. Forced routings are measured on the whole-sequence
    phase of the longest sequence of each batch: skew shows where many tokens meet the experts at once.

    Raises:
        UsageError: a size or routing that makes no sense, or nothing of the grid fits the engine.
    """
    for name, sizes in (("batch", batch), ("sequence", sequence)):
        if not sizes or any(type(n) is not int or n < 1 for n in sizes):
            raise UsageError(f"{name}: expected whole numbers of 1 or more, got {list(sizes)!r}")
    if type(decode_tokens) is not int or decode_tokens < 1:
        raise UsageError(f"decode_tokens: expected a whole number of 1 or more, got {decode_tokens!r}")
    for name in routing:
        if name not in ROUTINGS:
            raise UsageError(f"routing: unknown {name!r}; {choices_text(name, ROUTINGS)}")
    if not routing:
        raise UsageError(f"routing: none given; choices: {', '.join(ROUTINGS)}")
    cached = bool(manifest.io.cache_inputs)
    whole = "prefill" if cached else "forward"
    wanted: list[Workload] = []
    if "real" in routing:
        for phase in (whole, "decode") if cached else (whole,):
            wanted += [Workload(phase, b, s) for b in sorted(set(batch)) for s in sorted(set(sequence))]
    left_out: list[tuple[str, str]] = []
    forced = [r for r in ROUTINGS if r in routing and r != "real"]
    if forced and not manifest.moe_layers:
        left_out.append((f"routing {', '.join(forced)}", "the model has no MoE layer"))
        forced = []
    fitting = [s for s in sequence if _fault(manifest, Workload(whole, 1, s), decode_tokens) is None]
    if fitting:
        wanted += [Workload(whole, b, max(fitting), r) for b in sorted(set(batch)) for r in forced]
    kept = []
    for workload in wanted:
        fault = _fault(manifest, workload, decode_tokens)
        if fault is None:
            kept.append(workload)
        else:
            left_out.append((workload.text, fault))
    if not kept:
        why = "; ".join(sorted({reason for _, reason in left_out}))
        raise UsageError(f"no workload is left to measure: {why}")
    return Grid(tuple(kept), tuple(left_out))


def _fault(manifest: Manifest, workload: Workload, decode_tokens: int) -> str | None:
    limits = manifest.limits
    if limits.max_batch is not None and workload.batch > limits.max_batch:
        return f"the bundle's maximum batch is {limits.max_batch}"
    total = workload.sequence + (decode_tokens if workload.phase == "decode" else 0)
    if limits.max_sequence is not None and total > limits.max_sequence:
        more = f" and {decode_tokens} decoded ones" if workload.phase == "decode" else ""
        return (
            f"{workload.sequence} tokens{more} exceed the bundle's maximum sequence of {limits.max_sequence}"
        )
    return None
