"""Repositories for Triton's ONNX Runtime backend."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from moe_export.backends.onnxruntime.plugin import cpu_plugin_path
from moe_export.errors import BundleError, EnvironmentLacksError, UsageError
from moe_export.package import package_bundle
from moe_export.package.cpu_library import OLDEST_RUNTIME, read_library
from moe_export.runtime.session import load
from moe_export.schema import ModelIO, TensorSpec
from tests.helpers.tiny_bundle import make_tiny_bundle
from tests.ops.one_op import onnx_model

from .samples import expected, manifest_of, names, onnx_bundle, read_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
name: "net" platform: "onnxruntime_onnx" backend: "onnxruntime" default_model_filename: "model.onnx"
max_batch_size: 0
input { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ -1, 4 ] }
instance_group { count: 1 kind: KIND_CPU }
parameters { key: "enable_mem_pattern" value { string_value: "0" } }
"""


def test_configuration_and_files(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "bundle")
    made = package_bundle(bundle, tmp_path / "repository", name="net")
    assert (made.path, made.format, made.model, made.backend) == (
        tmp_path / "repository",
        "triton",
        "net",
        "onnxruntime",
    )
    config = read_config(made.path, "net")
    assert config == expected(CONFIG)
    assert config != expected(CONFIG.replace("[ -1, 4 ]", "[ -1, 5 ]"))
    assert names(made.path) == [
        "README.md",
        "net/1/large.bin",
        "net/1/model.onnx",
        "net/1/moe-export/manifest.json",
        "net/1/moe-export/tokenizer/tokenizer.json",
        "net/1/weights.bin",
        "net/config.pbtxt",
        "package.json",
    ]
    for path in ("model.onnx", "weights.bin", "large.bin"):
        assert (made.path / "net/1" / path).read_bytes() == (bundle / path).read_bytes()
    assert (made.path / "net/1/large.bin").samefile(bundle / "large.bin")
    assert not (made.path / "net/1/weights.bin").samefile(bundle / "weights.bin")
    assert manifest_of(made.path, "net").target == "onnxruntime"


def test_the_record_holds_every_file_with_its_hash(tmp_path: Path) -> None:
    made = package_bundle(onnx_bundle(tmp_path / "bundle"), tmp_path / "repository")
    record = json.loads((made.path / "package.json").read_text())
    assert {f["path"] for f in record["files"]} == set(names(made.path)) - {"package.json"}
    for entry in record["files"]:
        content = (made.path / entry["path"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert record["model"] == made.model == "bundle"


def test_the_model_runs_from_the_repository(tmp_path: Path) -> None:
    """Prefill with an empty past, then a step, each as a server would run it: same logits as the runtime."""
    bundle = make_tiny_bundle(tmp_path / "tiny")
    made = package_bundle(bundle, tmp_path / "repository")
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(made.path / "tiny/1/model.onnx", options)
    config = read_config(made.path, "tiny")
    assert [i.name for i in config.input] == [i.name for i in session.get_inputs()]
    assert [o.name for o in config.output] == [o.name for o in session.get_outputs()]
    ids = np.array([[3, 5, 8, 13], [2, 4, 6, 9]])
    with load(bundle, threads=1) as runtime:
        whole = runtime.run({"input_ids": ids})["logits"]
    sizes = {"batch": 2, "past": 0}
    specs = manifest_of(made.path, "tiny").io.cache_inputs
    cache: dict[str, Any] = {
        s.name: np.zeros([d if isinstance(d, int) else sizes[d] for d in s.shape], np.float32) for s in specs
    }
    outputs = [o.name for o in config.output]
    for start, end in ((0, 3), (3, 4)):
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": np.ones((2, end), np.int64),
            "position_ids": np.tile(np.arange(start, end), (2, 1)),
            **cache,
        }
        results = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        np.testing.assert_allclose(results["logits"], whole[:, start:end], atol=1e-5)
        cache = {s.name: results[str(s.pair)] for s in specs}


def one_op_bundle(folder: Path) -> Path:
    """``Dispatch`` as a bundle: a model with an op of ours."""
    model = onnx_model("Dispatch", {"num_experts": 4}, {"expert_ids": "int32"}, 20)
    value = {i.name: i for i in (*model.graph.input, *model.graph.output)}

    def spec(name: str) -> TensorSpec:
        kind = value[name].type.tensor_type
        dtype = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        return TensorSpec(name, dtype, tuple(f"d{i}" for i in range(len(kind.shape.dim))))

    io = ModelIO(
        tuple(spec(i.name) for i in model.graph.input), tuple(spec(o.name) for o in model.graph.output)
    )
    from moe_export.bundle import BundleWriter
    from tests.bundle.sample import make_manifest

    with BundleWriter(folder) as writer:
        onnx.save(model, writer.path / "model.onnx")
        return writer.commit(make_manifest(target="onnxruntime", io=io, text=None))


needs_plugin = pytest.mark.skipif(cpu_plugin_path() is None, reason="the CPU plugin is not installed")


@needs_plugin
def test_the_op_library_comes_along_and_serves_the_model(tmp_path: Path) -> None:
    bundle = one_op_bundle(tmp_path / "op")
    made = package_bundle(bundle, tmp_path / "repository", server_path="/srv/models/")
    (named,) = read_config(made.path, "op").model_operations.op_library_filename
    library = made.path / named.removeprefix("/srv/models/")
    assert named == "/srv/models/op/1/libmoe_export_cpu.so"
    assert library.read_bytes() == Path(str(cpu_plugin_path())).read_bytes()
    assert not library.samefile(str(cpu_plugin_path()))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    # Without its function bodies the model runs by the library's kernels or not at all.
    model = onnx.load(made.path / "op/1/model.onnx")
    del model.functions[:]
    bare = model.SerializeToString()
    with pytest.raises(Exception, match="Dispatch"):
        onnxruntime.InferenceSession(bare, onnxruntime.SessionOptions())
    feeds = {"expert_ids": np.array([[1, 0], [3, 1], [0, 2]], np.int32)}
    results = onnxruntime.InferenceSession(bare, options).run(None, feeds)
    with load(bundle, threads=1) as runtime:
        want = list(runtime.run(feeds).values())
    assert len(results) == len(want) > 1
    for got, right in zip(results, want, strict=True):
        np.testing.assert_array_equal(got, right)
    readme = (made.path / "README.md").read_text()
    assert read_library(library).needs in readme and named in readme


def test_without_the_plugin_only_when_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = one_op_bundle(tmp_path / "op")
    monkeypatch.setenv("MOE_EXPORT_CPU_PLUGIN", "off")
    made = package_bundle(bundle, tmp_path / "off")
    assert not read_config(made.path, "op").model_operations.op_library_filename
    assert "slower" in made.notes[0] and "slower" in (made.path / "README.md").read_text()
    monkeypatch.delenv("MOE_EXPORT_CPU_PLUGIN")
    monkeypatch.setattr("moe_export.backends.onnxruntime.plugin.importlib.util.find_spec", lambda _: None)
    with pytest.raises(EnvironmentLacksError, match="not installed"):
        package_bundle(bundle, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_what_a_library_needs(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    header = b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little")
    path.write_bytes(header + b"GLIBC_2.4\0GLIBC_2.36\0GLIBC_2.9\0")
    needs = read_library(path).needs
    assert needs == f"Linux on aarch64, glibc 2.36 or later, ONNX Runtime {OLDEST_RUNTIME} or later"
    path.write_bytes(b"\xcf\xfa\xed\xfe" + bytes(60))
    with pytest.raises(EnvironmentLacksError, match="no Linux library"):
        read_library(path)


def test_the_oldest_runtime_is_the_librarys_own() -> None:
    headers = "".join(p.read_text() for p in (ROOT / "plugins/cpu/ort").glob("*.h"))
    found = re.search(r"kApiVersion = (\d+);", headers)
    assert found is not None and f"1.{found[1]}" == OLDEST_RUNTIME


def test_scalars_and_types(tmp_path: Path) -> None:
    types = ("bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32")
    io = ModelIO((TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),
                 *(TensorSpec(t, t, (3, "n")) for t in types), TensorSpec("s", "float32", ())))  # fmt: skip
    made = package_bundle(onnx_bundle(tmp_path / "bundle", io=io), tmp_path / "repository")
    config = read_config(made.path, "bundle")
    kinds = [expected(f"output {{ data_type: TYPE_{t} }}").output[0].data_type
             for t in ("BOOL", "INT8", "UINT8", "INT32", "INT64", "FP16", "BF16", "FP32")]  # fmt: skip
    assert [o.data_type for o in config.output[1:-1]] == kinds
    assert all(list(o.dims) == [3, -1] for o in config.output[1:-1])
    assert list(config.output[-1].dims) == [1] and config.output[-1].HasField("reshape")
    assert not config.output[0].HasField("reshape")
    strange = ModelIO((TensorSpec("x", "complex64", (1,)),), io.outputs)
    with pytest.raises(UsageError, match="complex64"):
        package_bundle(onnx_bundle(tmp_path / "strange", io=strange), tmp_path / "no")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": (0,)}, "runs on CPUs"),
        ({"sm": 89}, "runs on CPUs"),
        ({"name": "a/b"}, "no name of a model"),
        ({"server_path": "models"}, "absolute path"),
        ({"server_path": "/a/../b"}, "absolute path"),
        ({"format": "kserve"}, "choices: triton"),
        ({"gpus": (0, 0)}, "twice"),
        ({"gpus": ()}, "expected ids"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        package_bundle(onnx_bundle(tmp_path / "bundle"), tmp_path / "repository", **options)
    assert not (tmp_path / "repository").exists()


def test_a_folder_whose_name_is_none_of_a_model_needs_one(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "my bundle")
    with pytest.raises(UsageError, match="--name"):
        package_bundle(bundle, tmp_path / "repository")
    assert package_bundle(bundle, tmp_path / "repository", name="mine").model == "mine"


def test_a_model_file_elsewhere_is_refused(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "bundle", model_file="weights.bin")
    with pytest.raises(BundleError, match="model_file"):
        package_bundle(bundle, tmp_path / "repository")


@pytest.mark.slow
def test_a_built_engine_gives_the_same_logits_from_the_repository(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from moe_export.api import build

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_hidden_layers=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    build(model, tmp_path / "mixtral", target="onnxruntime", verify=False, bench=False)
    repository = tmp_path / "repository"
    made = package_bundle(tmp_path / "mixtral", repository, server_path=str(repository))
    config_text = read_config(made.path, "mixtral")
    options = onnxruntime.SessionOptions()
    for name in config_text.model_operations.op_library_filename:
        options.register_custom_ops_library(name)
    session = onnxruntime.InferenceSession(made.path / "mixtral/1/model.onnx", options)
    ids = np.array([[5, 6, 7, 8, 1]])
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones((1, 5), np.int64),
                             "position_ids": np.arange(5)[None]}  # fmt: skip
    specs = manifest_of(made.path, "mixtral").io.cache_inputs
    feeds |= {s.name: np.zeros((1, 2, 0, 8), np.float32) for s in specs}
    outputs = [o.name for o in config_text.output]
    first = dict(zip(outputs, session.run(outputs, feeds), strict=True))
    step = {"input_ids": np.array([[3]]), "attention_mask": np.ones((1, 6), np.int64),
            "position_ids": np.array([[5]]), **{s.name: first[str(s.pair)] for s in specs}}  # fmt: skip
    second = dict(zip(outputs, session.run(outputs, step), strict=True))
    with load(tmp_path / "mixtral") as runtime:
        want = runtime.run({"input_ids": np.array([[5, 6, 7, 8, 1, 3]])})["logits"]
    np.testing.assert_allclose(first["logits"], want[:, :5], atol=1e-5)
    np.testing.assert_allclose(second["logits"], want[:, 5:], atol=1e-5)
