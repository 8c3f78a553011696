"""What a model needs: memory for weights and cache, work per token, GPUs. From its architecture alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_export.costs import FORMATS, GPUS, Assumptions, Gpu, WeightFormat
from moe_export.errors import UsageError
from moe_export.inspect.architecture import Architecture
from moe_export.inspect.model_costs import Step, whole_work

DEFAULT_CONTEXT = 4096
CACHE_FORMATS = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0}
"""Bytes per cached number."""


@dataclass(frozen=True)
class Workload:
    """``batch`` sequences of ``context`` tokens, weights and cache in these formats.

    The cache is as wide as activations unless told otherwise: float32 beside float32 weights, else bfloat16.
    """

    weights: WeightFormat
    cache: str = ""
    context: int = DEFAULT_CONTEXT
    batch: int = 1

    def __post_init__(self) -> None:
        if not self.cache:
            object.__setattr__(self, "cache", "float32" if self.weights.compute == "float32" else "bfloat16")
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.cache not in CACHE_FORMATS:
            raise UsageError(f"no cache format {self.cache!r}; choices: {', '.join(CACHE_FORMATS)}")

    @property
    def cache_bytes(self) -> float:
        """Bytes per cached number."""
        return CACHE_FORMATS[self.cache]


def context_note(arch: Architecture, context: int) -> str | None:
    """A warning when ``context`` is longer than the model's own maximum."""
    if arch.max_positions is None or context <= arch.max_positions:
        return None
    return f"the context of {context} tokens is longer than the model's maximum of {arch.max_positions}"


def sequence_bytes(arch: Architecture, load: Workload) -> int:
    """Cache of one sequence of the workload's context, in bytes."""
    return round(arch.cache_elements(load.context) * load.cache_bytes)


def cache_facts(arch: Architecture, load: Workload) -> dict[str, Any]:
    """The cache as JSON values: bytes per token while no window is full, per sequence, for the batch."""
    blocks = [block for layer in arch.decoder for block in layer.attentions]
    fixed = sum(block.state for block in blocks)
    per_token = arch.cache_elements(1) - fixed
    kinds = Counter(
        block.kind if block.window is None else f"{block.kind} ({block.window} tokens)" for block in blocks
    )
    facts: dict[str, Any] = {
        "dtype": load.cache,
        "context": load.context,
        "batch": load.batch,
        "bytes_per_token": round(per_token * load.cache_bytes),
        "bytes_per_sequence": sequence_bytes(arch, load),
        "bytes": sequence_bytes(arch, load) * load.batch,
        "layers": dict(kinds),
    }
    if fixed:
        facts["fixed_bytes_per_sequence"] = round(fixed * load.cache_bytes)
    if any(block.kind == "mla" for block in blocks):
        whole = arch.with_expanded_cache().cache_elements(1) - fixed
        facts["expanded_bytes_per_token"] = round(whole * load.cache_bytes)
    return facts


def work_facts(arch: Architecture, load: Workload) -> dict[str, Any]:
    """Operations and bytes per token at decode and at prefill of the workload, one GPU, uniform routing."""
    facts: dict[str, Any] = {}
    for step in (Step("decode", load.batch, load.context), Step("prefill", load.batch, load.context)):
        work = whole_work(arch, step, load.weights, load.cache_bytes)
        facts[step.phase] = {
            "flops": work.flops / step.tokens,
            "bytes": work.bytes / step.tokens,
            "weight_bytes": work.weights / step.tokens,
            "cache_bytes": work.cache / step.tokens,
            "activation_bytes": work.activations / step.tokens,
            "flops_per_byte": work.flops / work.bytes,
        }
    return facts


def rank_bytes(
    arch: Architecture, load: Workload, ranks: int, sequences: int, redundant: int = 0
) -> int:
    """Weights and cache on the fullest of ``ranks`` GPUs that share the experts, in bytes.

    Everything but the routed experts is on each; ``sequences`` is how many sequences' cache it keeps, and
    ``redundant`` slots per MoE layer hold replicas of experts.
    """
    return _sizes(arch, load, redundant)(ranks, sequences)


def _sizes(arch: Architecture, load: Workload, redundant: int = 0) -> Callable[[int, int], int]:
    """:func:`rank_bytes` for any ranks and sequences, what does not depend on them counted once."""
    counts, one = arch.parameters(), sequence_bytes(arch, load)
    blocks = Counter((moe.experts, moe.expert_parameters) for moe in arch.moe_layers)

    def size(ranks: int, sequences: int) -> int:
        held = sum(
            -(-(experts + redundant) // ranks) * each * layers for (experts, each), layers in blocks.items()
        )
        return load.weights.bytes_of(counts | {"routed_experts": held}) + sequences * one

    return size


def gpus_needed(arch: Architecture, load: Workload, gpu: Gpu, assumptions: Assumptions) -> dict[str, Any]:
    """How many of ``gpu`` hold weights and cache of the workload.

    ``split``: every matrix and the cache divided evenly (tensor parallel). ``expert_parallel``: experts
    divided, the rest on each GPU, sequences divided (``all_to_all``) or all on each (``all_reduce``); None
    where no number of GPUs is enough, with the ``reason``.
    """
    room, size = gpu.memory * assumptions.usable_memory, _sizes(arch, load)
    total = load.weights.bytes_of(arch.parameters()) + load.batch * sequence_bytes(arch, load)
    facts: dict[str, Any] = {"gpu": gpu.name, "memory_bytes": int(gpu.memory), "split": -int(-total // room)}
    most = min((moe.experts for moe in arch.moe_layers), default=1)
    for mode in ("all_to_all", "all_reduce"):
        facts[f"expert_parallel_{mode}"] = next(
            (ranks for ranks in range(1, most + 1) if size(ranks, _share(load.batch, ranks, mode)) <= room),
            None,
        )
    if facts["expert_parallel_all_to_all"] is None:
        if not arch.moe_layers:
            facts["reason"] = "the model has no experts to divide"
        else:
            least = size(most, _share(load.batch, most, "all_to_all"))
            facts["reason"] = f"with {most} ranks each still holds {least / 1e9:.1f} GB"
    return facts


def _share(batch: int, ranks: int, mode: str) -> int:
    return -(-batch // ranks) if mode == "all_to_all" else batch


def weights_only(total: int) -> dict[str, Any]:
    """What is known of a model whose parameters are counted and no more: its size at one width for all."""
    return {
        "weights_bytes": {name: f.bytes_of({"": total}) for name, f in FORMATS.items() if f.parts is None}
    }


def needs(arch: Architecture, load: Workload, assumptions: Assumptions | None = None) -> dict[str, Any]:
    """All of the above as JSON values. Bytes are exact sums; GPUs rest on ``assumptions``."""
    assumptions = assumptions or Assumptions()
    counts = arch.parameters()
    return {
        "weights": load.weights.name,
        "weights_bytes": {name: fmt.bytes_of(counts) for name, fmt in FORMATS.items()},
        "kv_cache": cache_facts(arch, load),
        "per_token": work_facts(arch, load),
        "gpus": [gpus_needed(arch, load, gpu, assumptions) for gpu in GPUS.values()],
        "usable_memory": assumptions.usable_memory,
    }
