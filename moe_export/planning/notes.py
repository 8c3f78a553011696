"""Caveats of a plan, in words."""

from __future__ import annotations

from collections.abc import Sequence

from moe_export.inspect.architecture import Architecture
from moe_export.inspect.needs import Workload, context_note, gpus_needed
from moe_export.planning.layout import Layout
from moe_export.planning.steps import Machine


def notes(
    arch: Architecture, load: Workload, machine: Machine, layouts: Sequence[Layout], fits: bool
) -> tuple[str, ...]:
    """What a reader of a plan's numbers has to know about them."""
    gpu = machine.gpu
    room = gpu.memory * machine.assumptions.usable_memory
    found = []
    if (warning := context_note(arch, load.context)) is not None:
        found.append(warning)
    if load.weights.compute == "float8" and "float8" not in gpu.peaks:
        found.append(f"{gpu.title} has no float8 arithmetic: multiplied in 16 bits")
    if any(block.kind == "mla" for layer in arch.layers for block in layer.attentions):
        found.append(
            "decode attends over the cached latent itself; an engine that first expands keys and values from "
            "it does more arithmetic"
        )
    if any(block.kind == "linear" for layer in arch.layers for block in layer.attentions):
        found.append(
            "linear attention at prefill is counted as its recurrence: the least arithmetic there is"
        )
    if any(layout.mode == "alltoall" for layout in layouts):
        found.append(
            "alltoall: blocks as large as the fullest has to be; TensorRT plans of moe-export have room for "
            "all tokens of a rank in each, so they send more (docs/expert-parallel.md, Predicted)"
        )
    if arch.encoder_decoder:
        found.append("encoder and decoder both hold the context; prefill is the encoder")
    if not fits:
        closest = min(layouts, key=lambda layout: layout.memory(arch, load))
        least = closest.memory(arch, load)
        found.append(
            f"the layout with least memory, {closest.text}, needs {least / 1e9:.1f} GB on a GPU that has "
            f"room for {room / 1e9:.1f} GB"
        )
        enough = gpus_needed(arch, load, gpu, machine.assumptions)
        ways = [f"{enough['split']} if everything is divided evenly"]
        if arch.moe_layers:
            ranks = enough["expert_parallel_all_to_all"]
            ways.insert(
                0, "expert parallel is never enough" if ranks is None else f"{ranks} with expert parallel"
            )
        found.append(f"GPUs of this type that would hold it: {', '.join(ways)}")
    return tuple(found)
