"""Runs a model whose weights are larger than the memory it may use, and prints what stays in memory.

    python tools/bench_memory.py --weights-gib 4 --limit-mib 512

The model is a stack of MoE layers (H 1024, I 2816, 16 experts, 2 per token, float32) as ``moe-export build``
writes them for the CPU plugin, with packed weights in an external file. A child process in a memory control
group with that limit loads it and decodes token by token. Weights that are used where they lie are
memory-mapped file pages, which the kernel drops when the limit is reached and reads again when an expert is
needed; a copy of them would be private memory, and beyond the limit the child would be killed.

Printed from /proc/self/status: private memory (RssAnon) and mapped file pages (RssFile) after loading and
after decoding, beside the size of all weights and of the experts that the tokens reached. Without a limit
(``--limit-mib 0``, no control group needed) the mapped pages are the experts that were reached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HIDDEN, INNER, EXPERTS, TOP_K = 1024, 2816, 16, 2
MIB = 2**20
LAYER_BYTES = 3 * EXPERTS * HIDDEN * INNER * 4
EXPERT_BYTES = LAYER_BYTES // EXPERTS
BLOCK = 16 * MIB


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights-gib", type=float, default=4.0, help="size of all expert weights")
    parser.add_argument("--limit-mib", type=int, default=512, help="memory of the child; 0: no limit")
    parser.add_argument("--tokens", type=int, default=8, help="decode steps, each to experts of its own")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(decode(options.child, options.tokens)))
        return 0
    layers = max(1, round(options.weights_gib * 2**30 / LAYER_BYTES))
    with tempfile.TemporaryDirectory() as folder, memory_group(options.limit_mib) as group:
        model = write_model(Path(folder), layers)
        command = [sys.executable, __file__, "--child", str(model), "--tokens", str(options.tokens)]
        if group is not None:
            # The shell joins the group, so that the interpreter is in it from its first page on.
            command = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["killed"])[-1]
        print(f"the child failed with a limit of {options.limit_mib} MiB: {last[:300]}")
        return 1
    sizes = {"weights_mib": layers * LAYER_BYTES / MIB, "limit_mib": float(options.limit_mib)}
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


def write_model(folder: Path, layers: int) -> Path:
    """``model.onnx`` and its weights, one block of random numbers repeated, written piece by piece."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    from moe_export.ops import DOMAIN, OPS, VERSION
    from moe_export.ops.packing import down_panels, up_panels

    shapes = {
        "up": (EXPERTS, up_panels(INNER, True), HIDDEN, 64),
        "down": (EXPERTS, down_panels(HIDDEN), INNER, 64),
    }
    attributes: dict[str, Any] = {"num_experts": EXPERTS, "packed": 1}
    nodes, initializers, offset = [], [], 0
    for layer in range(layers):
        given = "hidden" if layer == 0 else f"h{layer}"
        out = "out" if layer == layers - 1 else f"h{layer + 1}"
        names = [f"{kind}.{layer}" for kind in shapes]
        inputs = [given, f"ids.{layer}", "weights", *names]
        nodes.append(helper.make_node("ExpertMLP", inputs, [out], domain=DOMAIN, **attributes))
        for name, shape in zip(names, shapes.values(), strict=True):
            initializers.append(_external(name, shape, offset))
            offset += int(np.prod(shape)) * 4
    graph = helper.make_graph(
        nodes,
        "stack",
        [
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["T", HIDDEN]),
            helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["T", TOP_K]),
            *(
                helper.make_tensor_value_info(f"ids.{i}", TensorProto.INT32, ["T", TOP_K])
                for i in range(layers)
            ),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", HIDDEN])],
        initializers,
    )
    inner = {
        "ExpertMLP": attributes,
        "Dispatch": {"num_experts": EXPERTS},
        "GroupedMatMul": {},
        "Combine": {},
    }
    model = helper.make_model(
        graph,
        functions=[OPS[name].function(given, 20) for name, given in inner.items()],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    path = folder / "model.onnx"
    onnx.save(model, path)
    block = (np.random.default_rng(0).standard_normal(BLOCK // 4, dtype=np.float32) * 0.02).tobytes()
    with (folder / "model.onnx.data").open("wb") as file:
        for begin in range(0, offset, BLOCK):
            file.write(block[: min(BLOCK, offset - begin)])
        # Pages that this process left in the cache would not count for the child.
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def _external(name: str, shape: tuple[int, ...], offset: int) -> Any:
    import numpy as np
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    length = int(np.prod(shape)) * 4
    for key, value in {"location": "model.onnx.data", "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def decode(model: Path, tokens: int) -> dict[str, float]:
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
        "experts_reached_mib": len(reached) * EXPERT_BYTES / MIB,
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
