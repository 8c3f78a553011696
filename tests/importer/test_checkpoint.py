"""Checks of a model folder before torch: config, shards, hashes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moe_export.errors import SourceError, UnsupportedModelError
from moe_export.importer.checkpoint import (
    CheckpointInfo,
    check_finite,
    experts_in_config,
    inspect_checkpoint,
    source_hash,
)
from tests.helpers.checkpoints import (
    CONFIG,
    FIRST,
    SECOND,
    make_model,
    make_sharded,
    refusal,
    save,
)


def test_sound_folder(tmp_path: Path) -> None:
    info = inspect_checkpoint(str(make_model(tmp_path / "m")))
    assert isinstance(info, CheckpointInfo)
    assert (info.model_type, info.architectures) == ("mixtral", ("MixtralForCausalLM",))
    assert info.config == CONFIG
    assert info.shards == ("model.safetensors",)
    assert {n: (t.dtype, t.shape, t.shard, t.nbytes) for n, t in info.tensors.items()} == {
        "a": ("F32", (2, 3), "model.safetensors", 24),
        "b": ("BF16", (3,), "model.safetensors", 6),
    }
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    at = info.tensors["a"].begin
    assert np.frombuffer(content[at : at + 24], np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert info.total_bytes == 30
    check_finite(tmp_path / "m")


def test_sharded_folder(tmp_path: Path) -> None:
    info = inspect_checkpoint(make_sharded(tmp_path / "m"))
    assert info.shards == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert info.tensors["b"].shard == info.shards[1]
    assert info.total_bytes == 36


def test_what_transformers_saves_is_sound(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    for size in ("1GB", "4KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        info = inspect_checkpoint(tmp_path / size)
        assert len(info.shards) == 1 if size == "1GB" else len(info.shards) > 2
        assert experts_in_config(info.config) == 4
        assert info.total_bytes == 4 * sum(p.numel() for p in model.parameters())
        check_finite(tmp_path / size)


def test_a_known_model_does_not_import_torch(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    code = (
        "import sys; from moe_export.importer.checkpoint import *; "
        "i = inspect_checkpoint(sys.argv[1]); check_finite(sys.argv[1]); source_hash(sys.argv[1]); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _is(name: str, content: str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return folder

    return make


def _file(folder: Path) -> Path:
    return _is("model.gguf")(folder) / "model.gguf"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, r"m does not exist; a model folder has config\.json"),
        (_file, "is a GGUF file, not a Hugging Face model folder"),
        (_is("x.txt"), "a folder with x.txt, not a Hugging Face model folder"),
        (lambda p: (p.mkdir(), p)[1], "is an empty folder, not a Hugging"),
        (_is("model.onnx"), "a folder with ONNX files"),
        (_is("manifest.json", '{"schema_version": 1}'), "is a moe-export bundle, not a Hugging"),
        (_is("adapter_config.json", "{}"), "a PEFT adapter .*merge_and_unload"),
        (_is("model_index.json", "{}"), "a diffusers pipeline"),
        (_is("model.safetensors"), "a folder with safetensors files"),
        (_is("inner/config.json", "{}"), "holds model folders; name one of them: inner"),
        (_is("snapshots/0ab/config.json", "{}"), "name one of them: snapshots/0ab"),
        (lambda p: p / ("n" * 300), "does not exist|cannot be read"),
    ],
)
def test_not_a_model_says_what_it_is(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        inspect_checkpoint(make(tmp_path / "m"))


def test_hub_names_are_not_downloaded() -> None:
    assert "hf download mistralai/Mixtral-8x7B-v0.1 --local-dir" in refusal(
        lambda: inspect_checkpoint("mistralai/Mixtral-8x7B-v0.1")
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "config.json is not valid JSON"),
        ('{"a": 1,}', "config.json is not valid JSON: .*line 1 column"),
        ("[" * 100_000, "config.json is not valid JSON"),
        ("[1]", "config.json: expected a JSON object, got list"),
        ({}, "has no 'model_type'"),
        ({"model_type": 3}, "has no 'model_type'"),
        ({"model_type": ""}, "has no 'model_type'"),
        ({**CONFIG, "architectures": "Mixtral"}, "'architectures' is not a list"),
    ],
)
def test_broken_config(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        inspect_checkpoint(make_model(tmp_path / "m", config))


def test_unknown_model_type(tmp_path: Path) -> None:
    own = {"model_type": "mixtrall", "auto_map": {"AutoModel": "m.Own"}}
    plain = make_model(tmp_path / "a", {"model_type": "mixtrall"})
    message = refusal(lambda: inspect_checkpoint(plain), UnsupportedModelError)
    assert "unknown model_type 'mixtrall'; nearest: mixtral" in message and len(message) < 400
    mapped = make_model(tmp_path / "b", own)
    message = refusal(lambda: inspect_checkpoint(mapped), UnsupportedModelError)
    assert "--trust-remote-code" in message
    assert inspect_checkpoint(mapped, trust_remote_code=True).model_type == "mixtrall"
    assert "unknown model_type" in refusal(lambda: inspect_checkpoint(plain, trust_remote_code=True))


def test_types_registered_by_the_program_and_added_by_hand(tmp_path: Path) -> None:
    from transformers import AutoConfig, PreTrainedConfig

    class OwnConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
        model_type = "test-checkpoint-own"

    AutoConfig.register("test-checkpoint-own", OwnConfig)
    for model_type in ("test-checkpoint-own", "mlcd", "gpt-sw3"):
        folder = make_model(tmp_path / model_type, {"model_type": model_type})
        assert inspect_checkpoint(folder).model_type == model_type


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "compressed-tensors"}, r"CompressedTensorsConfig\(dequantize=True\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\).*\.dequantize\(\)"),
        ({"load_in_8bit": True}, r"\(bitsandbytes\).*\.dequantize\(\)"),
        ({"quant_method": "quanto"}, r"\(quanto\).*reads float weights and fp8, mxfp4, gptq, awq; "),
        ({"quant_method": ["fp8"]}, r"take the checkpoint it was made from"),
        ({"bits": 4}, r"quantised \(method not stated\)"),
        ("int8", r"quantised \(method not stated\)"),
    ],
)
def test_quantisations_that_are_not_read(tmp_path: Path, quantization: Any, message: str) -> None:
    for i, config in enumerate(
        (
            {**CONFIG, "quantization_config": quantization},
            {**CONFIG, "text_config": {"inner": {"quantization_config": quantization}}},
            {**CONFIG, "compression_config": quantization},
        )
    ):
        folder = make_model(tmp_path / str(i), config)
        with pytest.raises(UnsupportedModelError, match=message):
            inspect_checkpoint(folder)
    inspect_checkpoint(make_model(tmp_path / "none", {**CONFIG, "quantization_config": None}))


def test_the_advice_on_dequantising_names_what_transformers_has() -> None:
    import inspect

    import transformers

    from moe_export.importer.config_facts import _BY_CONFIG

    for name in _BY_CONFIG.values():
        assert "dequantize" in inspect.signature(getattr(transformers, name).__init__).parameters


def test_small_floats_without_a_quantization_config(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    save(folder / "model.safetensors", {"w": np.zeros(4, ml_dtypes.float8_e4m3fn)})
    message = refusal(lambda: inspect_checkpoint(folder), UnsupportedModelError)
    assert "tensor 'w' is F8_E4M3" in message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], r"pytorch_model.bin, a pickle, .*safe_serialization=True"),
        (["pytorch_model.bin.index.json", "x.bin"], "pytorch_model.bin.index.json, a pickle"),
        (["tf_model.h5"], "only in TensorFlow format"),
        (["consolidated.safetensors"], "only in Mistral's own format"),
        (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter"),
        (["model-00001-of-00002.safetensors"], "the index is missing"),
        ([], "has a config and no weights"),
    ],
)
def test_no_usable_weights(tmp_path: Path, names: list[str], message: str) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_text("")
    for check in (inspect_checkpoint, check_finite, source_hash):
        assert_match(refusal(lambda check=check: check(folder)), message)  # type: ignore[misc]


def assert_match(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text


def test_dangling_link_of_a_hub_cache(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    inspect_checkpoint(folder)
    (tmp_path / "blob").unlink()
    assert "is a link to a missing file" in refusal(lambda: inspect_checkpoint(folder))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def _both(folder: Path) -> None:
    save(folder / SECOND, {"b": np.zeros(3, np.float32), "a": np.zeros((2, 3), np.float32)})


def _text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SECOND).unlink(), f"1 of the 2 weight files .* are missing: {SECOND}"),
        (lambda f: [(f / n).unlink() for n in (FIRST, SECOND)], "2 of the 2 weight files"),
        (lambda f: edit_index(f, lambda m: m.update(c=FIRST)), f"tensor 'c' is in {FIRST}, which lacks it"),
        (
            lambda f: edit_index(f, lambda m: m.update(a=SECOND)),
            f"'a' is in {SECOND}, it is in {FIRST}|lacks",
        ),
        (_both, f"tensor 'a' lies in both {FIRST} and {SECOND}"),
        (lambda f: edit_index(f, lambda m: m.update(c="../x.safetensors")), "not the name of a safetensors"),
        (lambda f: edit_index(f, lambda m: m.update(c="/x.safetensors")), "not the name of a safetensors"),
        (lambda f: edit_index(f, lambda m: m.update(c="evil.bin")), "not the name of a safetensors"),
        (lambda f: edit_index(f, lambda m: m.update(c=3)), "not the name of a safetensors"),
        (_text("{"), "index.json is not valid JSON"),
        (_text("{}"), "'weight_map' is missing"),
        (_text('{"weight_map": {}}'), "'weight_map' is missing"),
        (_text('{"weight_map": []}'), "'weight_map' is missing"),
    ],
)
def test_broken_shards(tmp_path: Path, damage: Any, message: str) -> None:
    folder = make_sharded(tmp_path / "m")
    damage(folder)
    with pytest.raises(SourceError, match=message):
        inspect_checkpoint(folder)


def test_source_hash_sees_weights_and_config(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    hashes = [source_hash(folder)]
    cheap = [inspect_checkpoint(folder).hash_cheap]

    def after(change: object) -> None:
        hashes.append(source_hash(folder))
        cheap.append(inspect_checkpoint(folder).hash_cheap)

    content = (folder / SECOND).read_bytes()
    after((folder / SECOND).write_bytes(content[:-1] + b"\x01"))
    assert cheap[0] == cheap[1]
    after((folder / "config.json").write_text(json.dumps({**CONFIG, "x": 1})))
    after((folder / "generation_config.json").write_text("{}"))
    save(folder / SECOND, {"b": np.zeros((3, 1), np.float32)})
    after(None)
    assert len(set(hashes)) == 5
    assert len(set(cheap)) == 3
    (folder / "README.md").write_text("x")
    os.utime(folder / "config.json", (0, 0))
    assert source_hash(folder) == hashes[-1] and len(hashes[-1]) == 64
    (folder / SECOND).unlink()
    with pytest.raises(SourceError, match="are missing"):
        source_hash(folder)
