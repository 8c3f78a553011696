"""A small bundle to write, open and break; used by the tests here and by the child processes they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from moe_export.bundle import BundleWriter
from moe_export.schema import Limits, Manifest, ModelIO, SourceInfo, TensorSpec, TextInfo

ROOT = Path(__file__).parents[2]


def external_tensor(name: str, location: str, shape: tuple[int, ...] = (4, 4), **entries: str) -> TensorProto:
    """A float32 tensor whose data lies at ``location``; ``entries``: offset, length or anything else."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def make_model() -> onnx.ModelProto:
    """y = x · w, w external in ``weights.bin`` (64 bytes at offset 16)."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="/layers.0/matmul")
    graph = helper.make_graph(
        [node],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [external_tensor("w", "weights.bin", offset="16", length="64")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def fill(folder: Path, model: onnx.ModelProto | None = None) -> None:
    """The files of a bundle, without the manifest."""
    (folder / "model.onnx").write_bytes((model or make_model()).SerializeToString())
    (folder / "weights.bin").write_bytes(np.arange(20, dtype=np.float32).tobytes())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def make_manifest(**changes: object) -> Manifest:
    values = {
        "source": SourceInfo("module", None, "own", "Net", "00"),
        "task": "module",
        "target": "portable",
        "dtype": "float32",
        "opset": 20,
        "io": ModelIO(
            (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),)
        ),
        "limits": Limits(max_batch=8),
        "moe_layers": (),
        "text": TextInfo(vocab_size=256, tokenizer="tokenizer"),
        **changes,
    }
    return Manifest(**values)  # type: ignore[arg-type]  # the caller's changes are checked by the tests


def make_bundle(output: Path, *, overwrite: bool = False, **changes: object) -> Path:
    with BundleWriter(output, overwrite=overwrite) as writer:
        fill(writer.path)
        return writer.commit(make_manifest(**changes))


def names(folder: Path) -> list[str]:
    """Everything directly in a folder, hidden entries too."""
    return sorted(os.listdir(folder))


def child(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start Python on ``code``, with this module's names imported."""
    preamble = "import os, signal, sys, time\nfrom pathlib import Path\nfrom tests.bundle.sample import *\n"
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-c", preamble + code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]  # Popen's overloads do not take a dict
    )
    return process
