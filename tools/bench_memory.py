"""Runs a model whose weights are larger than the memory it may use, and prints what stays in memory.

    python tools/bench_memory.py --weights-gib 4 --limit-mib 512

The model is a stack of MoE layers (H 1024, I 2816, 16 experts, 2 per token) as ``moe-export build`` writes
them for the CPU plugin, with packed weights of ``--weights`` in an external file. A child process in a memory
control group with that limit loads it and decodes token by token. Weights that are used where they lie are
memory-mapped file pages, which the kernel drops when the limit is reached and reads again when an expert is
needed; a copy of them would be private memory, and beyond the limit the child would be killed.

Printed from /proc/self/status: private memory (RssAnon) and mapped file pages (RssFile) after loading and
after decoding, beside the size of all weights and of the experts that the tokens reached. Without a limit
(``--limit-mib 0``, no control group needed) the mapped pages are the experts that were reached.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from bench_arguments import new_file, number

HIDDEN, INNER, EXPERTS, TOP_K = 1024, 2816, 16, 2
MIB = 2**20
PIECE = 16 * MIB
OPSET = 20
WEIGHTS = ("float32", "float16", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class Form:
    """A layer's experts: the op, its attributes, and what it stores: name to element type and shape."""

    op: str
    attributes: Mapping[str, int]
    stored: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        """Bytes of one layer."""
        return sum(_nbytes(*stored) for stored in self.stored.values())


def _nbytes(kind: str, shape: tuple[int, ...]) -> int:
    import onnx_ir as ir

    return int(ir.DataType[kind].itemsize * math.prod(shape))


def form_of(weights: str) -> Form:
    """How a layer with such weights (:data:`WEIGHTS`) is stored for the CPU plugin."""
    from moe_export.ops.packing import PANEL_COLUMNS, down_panels, up_panels
    from moe_export.ops.quantization import BLOCK, KINDS
    from moe_export.ops.quantized_packing import WORD_STEPS

    panels = {"up": (up_panels(INNER, True), HIDDEN), "down": (down_panels(HIDDEN), INNER)}
    if weights not in KINDS:
        kind = "FLOAT" if weights == "float32" else weights.upper()
        given = {n: (kind, (EXPERTS, p, depth, PANEL_COLUMNS)) for n, (p, depth) in panels.items()}
        return Form("ExpertMLP", {"num_experts": EXPERTS, "packed": 1}, given)
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (count, depth) in panels.items():
        codes = (EXPERTS, count, depth, PANEL_COLUMNS)
        words = (EXPERTS, count, depth // WORD_STEPS, PANEL_COLUMNS, WORD_STEPS // 2)
        stored[f"{name}_codes"] = ("INT8", codes) if weights == "int8" else ("UINT8", words)
        stored[f"{name}_scales"] = ("FLOAT", (EXPERTS, count, depth // BLOCK, PANEL_COLUMNS))
    attributes = {"num_experts": EXPERTS, "bits": KINDS[weights], "block": BLOCK}
    return Form("QuantizedExpertMLP", attributes, stored)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="float32", help="how they are stored")
    parser.add_argument("--weights-gib", type=float, default=4.0, help="size of all expert weights")
    parser.add_argument("--limit-mib", type=int, default=512, help="memory of the child; 0: no limit")
    parser.add_argument("--tokens", type=number, default=8, help="decode steps, each to experts of its own")
    parser.add_argument("--json", type=new_file, help="write the result here, too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.limit_mib < 0 or not 0 < options.weights_gib < math.inf:
        parser.error("expected --limit-mib of 0 or more, --weights-gib above 0")
    form = form_of(options.weights)
    if options.child is not None:
        print(json.dumps(decode(options.child, options.tokens, form)))
        return 0
    layers = max(1, round(options.weights_gib * 2**30 / form.nbytes))
    with tempfile.TemporaryDirectory() as folder, memory_group(options.limit_mib) as group:
        model = write_model(Path(folder), layers, form)
        command = [sys.executable, __file__, "--child", str(model), "--weights", options.weights]
        command += ["--tokens", str(options.tokens)]
        if group is not None:
            # The shell joins the group, so that the interpreter is in it from its first page on.
            command = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["killed"])[-1]
        print(f"the child failed with a limit of {options.limit_mib} MiB: {last[:300]}")
        return 1
    sizes = {"weights_mib": layers * form.nbytes / MIB, "limit_mib": float(options.limit_mib)}
    result: dict[str, float] = {**sizes, **json.loads(child.stdout)}
    for name, value in result.items():
        print(f"{name:28s} {value:10.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


@contextmanager
def memory_group(limit_mib: int) -> Iterator[Path | None]:
    """A memory control group with a limit (version 2, else 1); None for no limit.

    Exits:
        with 3 when this user may not make one.
    """
    if not limit_mib:
        yield None
        return
    root = Path("/sys/fs/cgroup")
    new = (root / "cgroup.controllers").is_file()
    parent, file = (root, "memory.max") if new else (root / "memory", "memory.limit_in_bytes")
    group = parent / f"moe-export-{os.getpid()}"
    try:
        group.mkdir()
        (group / file).write_text(str(limit_mib * MIB), encoding="ascii")
    except OSError as error:
        print(f"error: no memory control group can be made here ({error}); run as root, or --limit-mib 0")
        sys.exit(3)
    try:
        yield group
    finally:
        group.rmdir()


def write_model(folder: Path, layers: int, form: Form) -> Path:
    """``model.onnx`` and its weights, a piece of random numbers per element type, written piece by piece."""
    import onnx_ir as ir

    from moe_export.graph.functions import attach_functions
    from moe_export.ops import DOMAIN, VERSION

    def value(name: str, kind: str, width: int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType[kind]), shape=ir.Shape(["T", width]))

    first, shares = value("hidden", "FLOAT", HIDDEN), value("weights", "FLOAT", TOP_K)
    inputs, initializers, nodes = [first, shares], [], []
    hidden, path = first, folder / "model.onnx"
    with (folder / "model.onnx.data").open("wb") as file:
        for layer in range(layers):
            ids = value(f"ids.{layer}", "INT32", TOP_K)
            inputs.append(ids)
            stored = []
            for name, (kind, shape) in form.stored.items():
                begin = file.tell()
                _write(file, kind, _nbytes(kind, shape))
                tensor = ir.ExternalTensor(
                    "model.onnx.data",
                    begin,
                    file.tell() - begin,
                    ir.DataType[kind],
                    shape=ir.Shape(shape),
                    name=f"{name}.{layer}",
                    base_dir=folder,
                )
                stored.append(ir.Value(name=tensor.name, const_value=tensor))
            initializers += stored
            given = [hidden, ids, shares, *stored]
            nodes.append(ir.node(form.op, given, attributes=dict(form.attributes), domain=DOMAIN))
            hidden = nodes[-1].outputs[0]
            hidden.name, hidden.type, hidden.shape = f"h{layer}", first.type, first.shape
        # Pages that this process left in the cache would not count for the child.
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    graph = ir.Graph(
        inputs,
        [hidden],
        nodes=nodes,
        initializers=initializers,
        name="stack",
        opset_imports={"": OPSET, DOMAIN: VERSION},
    )
    model = ir.Model(graph, ir_version=10)
    attach_functions(model, OPSET)
    ir.save(model, path)
    return path


def _write(file: BinaryIO, kind: str, nbytes: int) -> None:
    """Random numbers: small floats, or codes of any value."""
    piece = _piece(kind)
    for begin in range(0, nbytes, PIECE):
        file.write(piece[: min(PIECE, nbytes - begin)])


@cache
def _piece(kind: str) -> bytes:
    import numpy as np
    import onnx_ir as ir

    rng, dtype = np.random.default_rng(0), ir.DataType[kind].numpy()
    if dtype.kind in "iu":
        return rng.bytes(PIECE)
    return (rng.standard_normal(PIECE // dtype.itemsize, dtype=np.float32) * 0.02).astype(dtype).tobytes()


def decode(model: Path, tokens: int, form: Form) -> dict[str, float]:
    """In a process of its own: MiB of private memory and of mapped files, and what the tokens reached."""
    import numpy as np

    from moe_export.backends.onnxruntime.runner import create_session

    session = create_session(model)
    loaded = _resident()
    layers = sum(value.name.startswith("ids.") for value in session.get_inputs())
    names = {value.name for value in session.get_inputs()}
    rng = np.random.default_rng(0)
    reached: set[tuple[int, int]] = set()
    hidden = rng.standard_normal((1, HIDDEN), dtype=np.float32)
    for _ in range(tokens):
        ids = {f"ids.{i}": rng.permutation(EXPERTS)[None, :TOP_K].astype(np.int32) for i in range(layers)}
        reached |= {(i, int(e)) for i in range(layers) for e in ids[f"ids.{i}"][0]}
        feeds = {"hidden": hidden, "weights": np.full((1, TOP_K), 0.5, np.float32), **ids}
        (hidden,) = session.run(None, {n: a for n, a in feeds.items() if n in names})
        hidden = hidden / max(float(np.abs(hidden).max()), 1e-6)
    after = _resident()
    return {
        "experts_reached_mib": len(reached) * form.nbytes / EXPERTS / MIB,
        "private_after_load_mib": loaded["RssAnon"],
        "mapped_after_load_mib": loaded["RssFile"],
        "private_after_decode_mib": after["RssAnon"],
        "mapped_after_decode_mib": after["RssFile"],
    }


def _resident() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}


if __name__ == "__main__":
    sys.exit(main())
