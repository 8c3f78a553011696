"""Bundles of several ranks without a collective: each rank's graph is the whole tiny model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from moe_export.bundle.manifest import read_manifest
from moe_export.schema import ExpertParallel, LayerPlacement
from tests.helpers.tiny_bundle import make_tiny_bundle, write_manifest


def make_rank_bundle(
    folder: Path, ranks: int, mode: str, *, target: str = "portable", **options: Any
) -> Path:
    """A bundle whose ranks run the whole model: all of the batch (``allreduce``), or their part of it
    (``alltoall``). What it computes is what the tiny model computes."""
    make_tiny_bundle(folder, **options)
    for rank in range(ranks):
        place = folder / f"rank{rank}"
        place.mkdir()
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(folder / name, place / name)
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).unlink()
    manifest = read_manifest(folder)
    layers = tuple(
        LayerPlacement(
            layer.index,
            tuple(tuple(range(rank, layer.num_experts, ranks)) for rank in range(ranks)),
        )
        for layer in manifest.moe_layers
    )
    parallel = ExpertParallel(ranks, mode, layers=layers)  # type: ignore[arg-type] # the tests' own words
    changed = dataclasses.replace(
        manifest, target=target, model_file="rank0/model.onnx", expert_parallel=parallel
    )
    write_manifest(folder, changed)
    return folder
