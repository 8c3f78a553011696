"""Bundles to package, and what is read back from a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google.protobuf.text_format as text_format
import onnx
from tritonclient.grpc import model_config_pb2

from moe_export.bundle import BundleWriter
from moe_export.schema import EngineFile, ExpertParallel, Limits, Manifest, ModelIO, TensorSpec
from tests.bundle.sample import fill, make_manifest

ModelConfig = Any
IO = ModelIO(
    (
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
        TensorSpec("attention_mask", "int64", ("batch", "total"), "mask"),
        TensorSpec("past.0.key", "bfloat16", ("batch", 2, "past", 16), "cache", "present.0.key"),
        TensorSpec("past.0.conv", "float16", ("batch", 24, 4), "cache", "present.0.conv"),
        TensorSpec("moe_capacity", "int32", ("capacity",), "capacity"),
    ),
    (
        TensorSpec("logits", "float32", ("batch", "sequence", 100), "logits"),
        TensorSpec("present.0.key", "bfloat16", ("batch", 2, "total", 16), "cache", "past.0.key"),
        TensorSpec("present.0.conv", "float16", ("batch", 24, 4), "cache", "past.0.conv"),
        TensorSpec("moe_max_load", "int32", (3,), "load"),
    ),
)


def engine(file: str, sm: int = 89, profiles: tuple[str, ...] = ("all",)) -> EngineFile:
    """A plan as a manifest lists it."""
    return EngineFile(file, sm, "tensorrt", "11.4.0.106", "580", profiles, 12, {"MatMul": 12}, 100, 200, 1.5)


def tensorrt_bundle(
    folder: Path, *engines: EngineFile, model: onnx.ModelProto | None = None, **changes: Any
) -> Path:
    """A bundle of target tensorrt whose plans hold their own names."""
    with BundleWriter(folder) as writer:
        fill(writer.path)
        if "expert_parallel" in changes:
            (writer.path / "rank0").mkdir()
            onnx.save(model or load_model("Cast"), writer.path / "rank0/model.onnx")
        for entry in engines:
            file = writer.path / entry.file
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(f"plan {entry.file}".encode())
        values = {"target": "tensorrt", "io": IO, "limits": Limits(4, 2048), "engines": engines,
                  "sm": tuple(sorted({e.sm for e in engines})), **changes}  # fmt: skip
        return writer.commit(make_manifest(**values))


PLAIN_IO = ModelIO(
    tuple(spec for spec in IO.inputs if spec.role != "capacity"),
    tuple(spec for spec in IO.outputs if spec.role != "load"),
)


def load_model(*ops: str) -> onnx.ModelProto:
    """A graph whose ``moe_max_load`` is the last of ``ops`` on ``raw``."""
    values = ["raw", *(f"v{i}" for i in range(1, len(ops))), "moe_max_load"]
    attributes: dict[str, dict[str, Any]] = {"Cast": {"to": onnx.TensorProto.INT32}}
    nodes = [
        onnx.helper.make_node(op, [values[i]], [values[i + 1]], **attributes.get(op, {}))
        for i, op in enumerate(ops)
    ]
    ends = values[0], values[-1]
    first, last = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, [3]) for name in ends)
    graph = onnx.helper.make_graph(nodes, "main", [first], [last])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def ranks_bundle(folder: Path, ranks: int = 4, sms: tuple[int, ...] = (89,), **changes: Any) -> Path:
    """One plan per rank and SM."""
    engines = [engine(f"rank{r}/model.sm{sm}.plan", sm) for r in range(ranks) for sm in sms]
    values = {"expert_parallel": ExpertParallel(ranks, "allreduce"), "model_file": "rank0/model.onnx",
              "io": PLAIN_IO, **changes}  # fmt: skip
    return tensorrt_bundle(folder, *engines, **values)


def onnx_bundle(folder: Path, **changes: Any) -> Path:
    """An ONNX Runtime bundle without ops of ours, with a file large enough to be linked."""
    with BundleWriter(folder) as writer:
        fill(writer.path)
        (writer.path / "large.bin").write_bytes(b"\0" * (2 << 20))
        return writer.commit(make_manifest(**{"target": "onnxruntime", **changes}))


def read_config(repository: Path, model: str) -> ModelConfig:
    """``config.pbtxt`` by the official definition."""
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def expected(text: str) -> ModelConfig:
    """A configuration written by hand."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def names(folder: Path) -> list[str]:
    """Every file and link below ``folder``."""
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink()
    )


def manifest_of(repository: Path, model: str) -> Manifest:
    """The manifest in the repository."""
    from moe_export.bundle.manifest import read_manifest

    return read_manifest(repository / model / "1" / "moe-export")
