"""Compares GEMM libraries at the sizes that the groups of a MoE layer have, and the plugin with them.

    python tools/bench_gemm_libraries.py [--shape A,B] [--rows 1,8,64,512] [--rounds 5] [--markdown]

One group is the rows of one expert: a product with its up matrix [H, 2I] and one with its down matrix [I, H].
The libraries get just these two products; the plugin computes the whole expert (gather, SwiGLU and weighted
sum included). Every call takes another expert, and all experts together are far larger than the caches, so
weights come from memory as they do in a layer. Libraries take turns within each round; a quiet machine is
needed for absolute numbers, the ratios hold anyway.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_arguments import number, numbers, several
from moe_layer import Array, Layer, Shape
from moe_layer_models import save_model

from moe_export.backends.onnxruntime.plugin import cpu_plugin_path, cpu_plugin_problem
from moe_export.bench.machine import usable_cores

SHAPES = {"A": Shape("A", 1024, 2816, 8, 1), "B": Shape("B", 1024, 512, 40, 1)}
"""One expert per token, enough experts to be larger than the caches."""
PAUSE_SECONDS = 0.1
"""Between turns: the threads of the last library spin for a while before they sleep."""
Group = Callable[[Array, int], Any]
"""Computes the group of these rows with expert number n."""


def mkl(layer: Layer) -> Group:
    """torch.mm: MKL in the wheels for x86."""
    import torch

    up, down = torch.from_numpy(layer.up), torch.from_numpy(layer.down)

    def run(rows: Array, expert: int) -> Any:
        with torch.inference_mode():
            inner = torch.from_numpy(rows) @ up[expert].T
            return inner[:, : layer.shape.intermediate] @ down[expert].T

    return run


def onednn(layer: Layer) -> Group:
    """oneDNN through torch's mkldnn tensors, weights in oneDNN's layout."""
    import torch
    from torch.utils.mkldnn import to_mkldnn

    def linear(matrix: Array) -> Any:
        module = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        module.weight = torch.nn.Parameter(torch.from_numpy(matrix), requires_grad=False)
        return to_mkldnn(module.eval())

    ups = [linear(matrix) for matrix in layer.up]
    downs = [linear(matrix) for matrix in layer.down]

    def run(rows: Array, expert: int) -> Any:
        with torch.inference_mode():
            inner = ups[expert](torch.from_numpy(rows).to_mkldnn()).to_dense()
            part = inner[:, : layer.shape.intermediate].contiguous()
            return downs[expert](part.to_mkldnn()).to_dense()

    return run


def openblas(layer: Layer) -> Group:
    """numpy.matmul: OpenBLAS in the wheels."""

    def run(rows: Array, expert: int) -> Any:
        inner = rows @ layer.up[expert].T
        return inner[:, : layer.shape.intermediate] @ layer.down[expert].T

    return run


def onnxruntime(layer: Layer, threads: int) -> Group:
    """MatMul of ONNX Runtime (MLAS), weights packed at load. One session per expert."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of the session before do not spin while this one works.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = [
        ort.InferenceSession(_matmuls(layer, e), options, providers=["CPUExecutionProvider"])
        for e in range(layer.shape.experts)
    ]
    return lambda rows, expert: sessions[expert].run(None, {"rows": rows})[0]


def _matmuls(layer: Layer, expert: int) -> bytes:
    """A model with the two products of one expert."""
    import onnx_ir as ir

    s = layer.shape
    float_type = ir.TensorType(ir.DataType.FLOAT)
    rows = ir.Value(name="rows", shape=ir.Shape(["rows", s.hidden]), type=float_type)
    weights = []

    def constant(name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
        )
        weights.append(value)
        return value

    cut = [constant(n, np.asarray([v])) for n, v in (("zero", 0), ("end", s.intermediate), ("axis", 1))]
    inner = ir.node("MatMul", [rows, constant("up", layer.up[expert].T)])
    part = ir.node("Slice", [inner.outputs[0], *cut])
    outer = ir.node("MatMul", [part.outputs[0], constant("down", layer.down[expert].T)])
    out = outer.outputs[0]
    out.name, out.type, out.shape = "out", float_type, ir.Shape(["rows", s.hidden])
    nodes = [inner, part, outer]
    graph = ir.Graph([rows], [out], nodes=nodes, initializers=weights, name="group", opset_imports={"": 22})
    proto: Any = ir.to_proto(ir.Model(graph, ir_version=10))
    data: bytes = proto.SerializeToString()
    return data


def plugin(layer: Layer, form: str, threads: int, folder: Path) -> Group | None:
    """The plugin's ExpertMLP; None where the plugin is not installed."""
    import onnxruntime as ort

    library = cpu_plugin_path()
    if library is None:
        print(f"the plugin is left out: {cpu_plugin_problem()}")
        return None
    path = folder / form / "model.onnx"
    path.parent.mkdir()
    save_model(layer, form, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(rows: Array, expert: int) -> Any:
        logits = np.zeros((len(rows), layer.shape.experts), np.float32)
        logits[:, expert] = 9.0
        return session.run(None, {"hidden": rows, "logits": logits})[0]

    return run


def _check(name: str, group: Group, layer: Layer, whole: bool) -> None:
    """Raise SystemExit where the products are wrong. ``whole``: the whole expert, not just the products."""
    rows = np.random.default_rng(1).standard_normal((3, layer.shape.hidden)).astype(np.float32)
    up, down = layer.up[1].astype(np.float64), layer.down[1].astype(np.float64)
    gate, linear = np.split(rows @ up.T, 2, axis=1)
    expected = (gate / (1 + np.exp(-gate)) * linear if whole else gate) @ down.T
    error = np.abs(np.asarray(group(rows, 1), np.float64) - expected).max()
    if not error <= 1e-4:
        raise SystemExit(f"{name}: wrong result, largest error {error:.3g}")


def _time(group: Group, rows: Array, experts: int) -> float:
    """Median seconds of one group, each with another expert."""
    times = []
    for expert in range(min(experts, 16)):
        begin = time.perf_counter()
        group(rows, expert)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", type=several(SHAPES), default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=numbers, default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=number, default=5)
    parser.add_argument("--threads", type=number, default=usable_cores())
    parser.add_argument("--markdown", action="store_true", help="print tables for docs/cpu-plugin.md")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    for name in options.shape:
        with tempfile.TemporaryDirectory(prefix="gemm_libraries_") as folder:
            _measure(SHAPES[name], options.rows, options, Path(folder))
    return 0


def _measure(shape: Shape, sizes: Sequence[int], options: argparse.Namespace, folder: Path) -> None:
    layer = Layer(shape, "float32")
    groups: dict[str, Group] = {
        "MKL (torch)": mkl(layer),
        "oneDNN (torch)": onednn(layer),
        "OpenBLAS (NumPy)": openblas(layer),
        "ONNX Runtime": onnxruntime(layer, options.threads),
    }
    for name, group in groups.items():
        _check(name, group, layer, whole=False)
    for form in ("packed", "unpacked"):
        made = plugin(layer, form, options.threads, folder)
        if made is not None:
            groups[f"plugin, {form}"] = made
            _check(form, made, layer, whole=True)
    table: dict[str, list[float]] = {name: [] for name in groups}
    for count in sizes:
        rows = np.random.default_rng(0).standard_normal((count, shape.hidden)).astype(np.float32)
        samples: dict[str, list[float]] = {name: [] for name in groups}
        for turn in range(options.rounds + 1):
            for name, group in groups.items():
                time.sleep(PAUSE_SECONDS)
                group(rows, shape.experts - 1)
                seconds = _time(group, rows, shape.experts - 1)
                if turn:
                    samples[name].append(seconds)
        for name, values in samples.items():
            table[name].append(statistics.median(values))
    _print(shape, sizes, table, options.markdown)


def _print(shape: Shape, sizes: Sequence[int], table: dict[str, list[float]], markdown: bool) -> None:
    print(f"\nshape {shape.name}: H {shape.hidden}, I {shape.intermediate}; ms per group (GFLOP/s)")
    edge = "| " if markdown else ""
    titles = [f"{'library':<18}", *(f"{f'{count} rows':>16}" for count in sizes)]
    print(edge + " | ".join(titles) + (" |" if markdown else ""))
    if markdown:
        print("|---" * len(titles) + "|")
    for name, seconds in table.items():
        cells = [
            f"{f'{value * 1e3:.3f} ({shape.flops(count) / value / 1e9:.0f})':>16}"
            for value, count in zip(seconds, sizes, strict=True)
        ]
        print(edge + " | ".join([f"{name:<18}", *cells]) + (" |" if markdown else ""), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
