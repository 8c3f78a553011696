"""Bundles of several ranks, made by hand: each rank's graph is the whole tiny model, so that what all ranks
compute together is what the tiny model computes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from moe_export.bundle.manifest import read_manifest
from moe_export.ops import DOMAIN
from moe_export.schema import ExpertParallel, LayerPlacement, Manifest
from tests.helpers.tiny_bundle import make_tiny_bundle, write_manifest


def make_rank_bundle(
    folder: Path,
    ranks: int,
    mode: str,
    *,
    exchange: bool = False,
    capacity: int | None = None,
    **options: Any,
) -> Path:
    """A bundle whose ranks run the whole model: all of the batch (``allreduce``), or their part of it
    (``alltoall``).

    ``exchange``: per MoE layer every rank gives its share of the output to an AllReduce, so the ranks must
    run in step; needs the CPU plugin. ``capacity``: a layer with more tokens of one rank than this fails on
    all ranks.
    """
    make_tiny_bundle(folder, **options)
    manifest = read_manifest(folder)
    if exchange:
        path = folder / "model.onnx"
        model = onnx.load(path)
        _add_exchange(model, manifest, ranks, mode, capacity)
        (folder / "model.onnx.data").unlink()
        onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    for rank in range(ranks):
        place = folder / f"rank{rank}"
        place.mkdir()
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(folder / name, place / name)
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).unlink()
    layers = tuple(
        LayerPlacement(
            layer.index,
            tuple(tuple(range(rank, layer.num_experts, ranks)) for rank in range(ranks)),
        )
        for layer in manifest.moe_layers
    )
    changed = dataclasses.replace(
        manifest,
        target="onnxruntime" if exchange else "portable",
        model_file="rank0/model.onnx",
        expert_parallel=ExpertParallel(ranks, mode, layers=layers),  # type: ignore[arg-type] # our own words
    )
    write_manifest(folder, changed)
    return folder


def _add_exchange(
    model: onnx.ModelProto, manifest: Manifest, ranks: int, mode: str, capacity: int | None
) -> None:
    """``moe.<i>.output`` becomes a sum over the ranks. With the batch divided it is this rank's alone, which
    the largest number of tokens of all ranks is added to and taken from."""
    graph = model.graph

    def add(op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        graph.node.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))
        return output

    def constant(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    for layer in manifest.moe_layers:
        whole, own = layer.output, f"{layer.output}.own"
        for node in graph.node:
            node.output[:] = [own if name == whole else name for name in node.output]
        words = {"domain": DOMAIN, "ranks": ranks, "layer": layer.name}
        if mode == "allreduce":
            share = add("Mul", [own, constant(f"{own}.share", np.float32(1 / ranks))], f"{own}.part")
            add("AllReduce", [share], whole, reduce="sum", **words)
            continue
        tokens = add("Shape", [layer.hidden], f"{own}.tokens", start=0, end=1)
        load = add("AllReduce", [tokens], f"{own}.load", reduce="max", **words)
        if capacity is not None:
            room = constant(f"{own}.room", np.array([capacity], np.int64))
            load = add(
                "CheckCapacity", [load, room], f"{own}.checked", domain=DOMAIN, layer=layer.name
            )
        zero = add("Sub", [load, load], f"{own}.zero")
        nothing = add("Cast", [zero], f"{own}.nothing", to=onnx.TensorProto.FLOAT)
        add("Add", [own, nothing], whole)
    _sort(graph)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _sort(graph: onnx.GraphProto) -> None:
    """Nodes behind those that they read from."""
    waiting, known = list(graph.node), {v.name for v in (*graph.input, *graph.initializer)} | {""}
    del graph.node[:]
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        assert ready, "the graph has a cycle"
        graph.node.extend(ready)
        known |= {name for node in ready for name in node.output}
        waiting = [node for node in waiting if not any(node is other for other in ready)]
