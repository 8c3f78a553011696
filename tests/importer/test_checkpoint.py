"""Checks of a model folder before torch: headers, shards, config, finite weights, hashes."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from moe_export.errors import SourceError, UnsupportedModelError
from moe_export.importer.checkpoint import (
    CheckpointInfo,
    check_finite,
    experts_in_config,
    hash_of_digests,
    inspect_checkpoint,
    source_hash,
)
from moe_export.importer.read_through import read_through
from moe_export.importer.safetensors_header import DTYPE_BITS, read_header
from moe_export.progress import NullProgress

CONFIG = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "C64": np.complex64,
    "I64": np.int64,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}

Header = dict[str, Any]


def file_bytes(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def save(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """A safetensors file, written here so that any dtype and any bit pattern can be in it."""
    header: Header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        content = tensor.tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    path.write_bytes(file_bytes(header, data))


def make_model(folder: Path, config: object = CONFIG) -> Path:
    """A folder with one weight file of two tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save(
        folder / "model.safetensors",
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)},
    )
    return folder


def make_sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save(folder / "model-00001-of-00002.safetensors", {"a": np.zeros((2, 3), np.float32)})
    save(folder / "model-00002-of-00002.safetensors", {"b": np.zeros(3, np.float32)})
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refusal(call: Callable[[], object], kind: type[Exception] = SourceError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


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


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


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


def _tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: 0 bytes"),
        (b"\x01\x02", "is truncated: 2 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (struct.pack("<Q", 2**63) + b"{}", f"header claims {2**63} bytes"),
        (b"PK\x03\x04" + bytes(1000), "is not a safetensors file, or its header is corrupt"),
        (struct.pack("<Q", 100) + b"{}", "is truncated: its header takes 108 bytes, the file has 10"),
        (file_bytes(b"", b""), "corrupt header: it does not start with"),
        (file_bytes(b" {}", b""), "header is corrupt: it does not start with"),
        (file_bytes(b"{]", b""), "corrupt header: "),
        (file_bytes(b'{"\xff": 1}', b""), "corrupt header: .*utf-8"),
        (file_bytes(b'{"a":' * 50_000, b""), "corrupt header: "),
        (file_bytes(b'{"a": {}, "a": {}}', b""), "'a' is given twice"),
        (file_bytes({"__metadata__": {"a": 1}}, b""), "__metadata__ is not a table of texts"),
        (file_bytes({"__metadata__": []}, b""), "__metadata__ is not a table of texts"),
        (file_bytes({"a": 1}, b""), "tensor 'a': expected dtype, shape and data_offsets"),
        (file_bytes({"a": _tensor(0, 4, dtype="F33")}, bytes(4)), "unknown dtype 'F33'; known: BF16"),
        (file_bytes({"a": _tensor(0, 4, [-1])}, bytes(4)), "shape .* is not a list of sizes"),
        (file_bytes({"a": {**_tensor(0, 4), "shape": [True]}}, bytes(4)), "is not a list of sizes"),
        (file_bytes({"a": {**_tensor(0, 4), "data_offsets": [0]}}, bytes(4)), "are not two numbers"),
        (file_bytes({"a": {**_tensor(0, 4), "data_offsets": [4, 0]}}, bytes(4)), "are out of order"),
        (file_bytes({"a": {**_tensor(0, 4), "data_offsets": [-4, 0]}}, bytes(4)), "are out of order"),
        (file_bytes({"a": _tensor(0, 4, [2])}, bytes(4)), r"4 bytes do not hold F32 of shape \[2\]"),
        (file_bytes({"a": _tensor(0, 1, [1], "F4")}, bytes(1)), "1 bytes do not hold F4"),
        (file_bytes({"a": _tensor(0, 4, [2**40, 2**40])}, bytes(4)), "do not hold"),
        (file_bytes({"a": _tensor(0, 8)}, bytes(4)), r"truncated: tensor 'a' ends at byte \d+, the file has"),
        (file_bytes({"a": _tensor(4, 8)}, bytes(8)), "tensor 'a' leaves a gap after 'the header'"),
        (file_bytes({"a": _tensor(0, 4), "b": _tensor(8, 12)}, bytes(12)), "'b' leaves a gap after 'a'"),
        (file_bytes({"a": _tensor(0, 8), "b": _tensor(4, 12)}, bytes(12)), "'b' overlaps 'a'"),
        (file_bytes({"a": _tensor(0, 4), "b": _tensor(0, 4)}, bytes(4)), "'b' overlaps 'a'"),
        (file_bytes({"a": _tensor(0, 4)}, bytes(7)), "3 bytes after its last tensor belong to none"),
        (file_bytes({}, b""), "holds no tensor"),
    ],
)
def test_broken_weight_file(tmp_path: Path, content: bytes, message: str) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        inspect_checkpoint(folder)


def test_truncated_shard_at_every_length(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "truncated" in refusal(lambda: inspect_checkpoint(folder))
    path.write_bytes(content)
    inspect_checkpoint(folder)


def test_unreadable_weight_file(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "model.safetensors is not a file" in refusal(lambda: inspect_checkpoint(folder))
    with pytest.raises(SourceError, match="cannot be read"):
        read_header(folder / "model.safetensors")


def test_every_dtype_of_safetensors_is_known(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_bytes({"a": _tensor(0, 4, dtype="NOPE")}, bytes(4)))
    with pytest.raises(SafetensorError) as caught, safe_open(path, "np"):
        pass
    known = {text for text in str(caught.value).split("expected one of")[1].split("`")[1::2]}
    assert known == set(DTYPE_BITS)


def their_view(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the safetensors library makes of a file; None = refused."""
    try:
        with safe_open(path, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except SafetensorError:
        return None


SIZES = st.integers(-1, 3) | st.sampled_from([2**62, 2**64])
FUZZED = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | st.just("F33"),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.tuples(SIZES, st.integers(-1, 16)).map(list),
    }
)


@st.composite
def near_sound(draw: st.DrawFn) -> tuple[Header, bytes]:
    """A sound header with at most one thing changed."""
    header: Header = {}
    end = 0
    tensors: list[str] = draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4))
    for name in tensors:
        dtype = draw(st.sampled_from(sorted(set(DTYPE_BITS) - {"F6_E2M3", "F6_E3M2", "F4"})))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        size = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    length = end
    changed: bool = draw(st.booleans())
    if header and changed:
        entry: dict[str, Any] = header[draw(st.sampled_from(sorted(header)))]
        change = draw(st.sampled_from(["dtype", "shape", "data_offsets", "length"]))
        if change == "length":
            length = max(0, end + draw(st.integers(-4, 4)))
        else:
            fuzzed: dict[str, Any] = draw(FUZZED)
            entry[change] = fuzzed[change]
    return header, bytes(length)


@given(
    case=near_sound()
    | st.tuples(st.dictionaries(st.text(max_size=2), FUZZED, max_size=3), st.binary(max_size=20))
)
@example(case=({"a": {"dtype": "BF16", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}, b""))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_headers_are_judged_as_the_safetensors_library_does(
    tmp_path: Path, case: tuple[Header, bytes]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(*case))
    theirs = their_view(path)
    try:
        ours = {name: (entry.dtype, list(entry.shape)) for name, entry in read_header(path).items()}
    except SourceError:
        assert theirs is None, theirs
    else:
        assert ours == theirs


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_model_or_a_source_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "m"
    if not folder.exists():
        make_model(folder)
        (tmp_path / "sound").write_bytes((folder / "model.safetensors").read_bytes())
    content = bytearray((tmp_path / "sound").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    (folder / "model.safetensors").write_bytes(content)
    try:
        inspect_checkpoint(folder)
    except SourceError as error:
        assert str(error)
        return
    assert their_view(folder / "model.safetensors") is not None


@pytest.mark.parametrize(
    "dtype", [name for name in DTYPES if name not in ("F64", "F32", "C64", "I64", "BOOL")]
)
def test_every_bit_pattern_of_small_floats(tmp_path: Path, dtype: str) -> None:
    """All 256 or 65536 patterns, judged by ml_dtypes and NumPy."""
    kind = np.dtype(DTYPES[dtype])
    patterns = np.arange(256**kind.itemsize, dtype=f"u{kind.itemsize}").view(kind)
    with np.errstate(invalid="ignore"):
        wide = patterns.astype(np.float64)
    bad = ~np.isfinite(wide)
    assert bad.any()
    folder = make_model(tmp_path / "m")
    save(folder / "model.safetensors", {"ok": patterns[~bad]})
    check_finite(folder)
    save(folder / "model.safetensors", {"ok": patterns[~bad], "w": patterns.reshape(16, -1)})
    message = refusal(lambda: check_finite(folder))
    counts = [f"{n} {w}" for n, w in ((np.isnan(wide).sum(), "NaN"), (np.isinf(wide).sum(), "infinite")) if n]
    first = [int(i) for i in np.argwhere(bad.reshape(16, -1))[0]]
    assert f"tensor 'w' in {folder / 'model.safetensors'} has {' and '.join(counts)} of its values" in message
    assert f"the first at {first};" in message
    assert "'ok'" not in message


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bit_patterns(tmp_path: Path, dtype: str, data: st.DataObject) -> None:
    kind = np.dtype(DTYPES[dtype])
    edges = [0, 1, 0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0x7FC0_0000, 0x7F7F_FFFF, 0x7FF0_0000_0000_0000]
    numbers = st.integers(0, 256**kind.itemsize - 1) | st.sampled_from(edges).map(
        lambda n: n % 256**kind.itemsize
    )
    values = np.array(data.draw(st.lists(numbers, min_size=1, max_size=30)), f"u{kind.itemsize}").view(kind)
    folder = tmp_path / "m"
    if not folder.exists():
        make_model(folder)
    save(folder / "model.safetensors", {"pad": np.zeros(1, np.bool_), "w": values})
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(wide))
    if not bad.size:
        check_finite(folder)
        return
    message = refusal(lambda: check_finite(folder))
    assert f"the first at [{bad[0]}]" in message
    assert (f"{np.isnan(wide).sum()} NaN" in message) == bool(np.isnan(wide).any())
    assert (f"{np.isinf(wide).sum()} infinite" in message) == bool(np.isinf(wide).any())


def test_kinds_of_bad_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    path = folder / "model.safetensors"
    weights = np.zeros((2, 3, 4), np.complex64)
    weights[1, 2, 3] = complex(0, np.inf)
    save(path, {"z": weights})
    assert "1 infinite of its values, the first at [1, 2, 3]" in refusal(lambda: check_finite(folder))
    save(path, {"scalar": np.array(np.nan, np.float32)})
    assert "tensor 'scalar' in" in refusal(lambda: check_finite(folder))
    save(path, {f"w{i}": np.array([0, -np.inf], np.float16) for i in range(5)})
    message = refusal(lambda: check_finite(folder))
    assert all(f"'w{i}'" in message for i in range(3)) and "; and 2 more tensors" in message
    save(path, {"i": np.full(4, -1), "flag": np.ones(2, np.bool_), "empty": np.zeros((0, 3), np.float32)})
    check_finite(folder)


def test_finite_check_is_blockwise(tmp_path: Path) -> None:
    """64 MiB of weights with the fault in the last block: little memory, right coordinate, full progress."""
    folder = make_model(tmp_path / "m")
    path = folder / "model.safetensors"
    shape = [4096, 4096]
    header = file_bytes({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 26]}}, b"")
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + (1 << 26))
    from tests.bundle.test_writer import Recorder

    progress = Recorder()
    tracemalloc.start()
    try:
        check_finite(folder, progress)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
    assert progress.stages == {"check weights": [1 << 26, 1 << 26]}
    with path.open("r+b") as stream:
        stream.seek(len(header) + (1 << 26) - 8)
        stream.write(np.array(np.nan, np.float32).tobytes())
    assert "1 NaN of its values, the first at [4095, 4094]" in refusal(lambda: check_finite(folder))


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


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_local_experts": 8}, 8),
        ({"num_experts": 60}, 60),
        ({"n_routed_experts": 256, "n_shared_experts": 1}, 256),
        ({"moe_num_experts": 64}, 64),
        ({"num_experts": [1, 8, 16]}, 16),
        ({"text_config": {"num_experts": 4}}, 4),
        ({"vision_config": {"num_local_experts": 60}, "text_config": {"n_routed_experts": 4}}, 4),
        ({"talker_config": {"num_experts": 2}, "thinker_config": {"text_config": {"num_experts": 4}}}, 4),
        ({"ffn_config": {"moe_num_experts": 16}}, 16),
        ({"own": {"num_experts": 3}}, 3),
        ({"vision_config": {"num_experts": 3}}, 3),
        ({}, None),
        ({"num_experts": None}, None),
        ({"num_experts": 0}, None),
        ({"num_experts": 1}, None),
        ({"num_experts": "8"}, None),
        ({"num_experts": True}, None),
        ({"num_experts": []}, None),
        ({"num_experts_per_tok": 2, "n_shared_experts": 2}, None),
        ({"is_moe": False, "num_experts": 16384}, None),
        ({"is_moe": True, "num_experts": 16384}, 16384),
        ({"text_config": {"enable_moe_block": False, "num_experts": 4}}, None),
        ({"quantization_config": {"num_experts": 4}}, None),
    ],
)
def test_experts_in_config(config: dict[str, Any], count: int | None) -> None:
    assert experts_in_config(config) == count


def test_experts_in_every_config_of_transformers() -> None:
    """Each config class that has a field with the number of experts is read rightly at its defaults."""
    import logging

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.disable(logging.WARNING)
    expected = {
        "mixtral": 8,
        "qwen2_moe": 60,
        "qwen3_moe": 128,
        "deepseek_v2": 64,
        "deepseek_v3": 256,
        "gpt_oss": 128,
        "olmoe": 64,
        "phimoe": 16,
        "glm4_moe": 128,
        "granitemoe": 8,
        "llama4": 16,
        "switch_transformers": 8,
        "nllb-moe": 128,
        "jamba": 16,
        "dbrx": 4,
        "aria": 8,
        "ernie4_5_vl_moe": 64,
        "qwen3_omni_moe": 128,
        "dots3_note": 256,
        "longcat_flash": 512,
        "doge": None,
        "gemma4": None,
        "vitpose": None,
        "hunyuan_v1_moe": None,
        "llama": None,
        "bert": None,
        "t5": None,
    }
    try:
        found = {name: experts_in_config(CONFIG_MAPPING[name]().to_dict()) for name in expected}
        assert found == expected
        from moe_export.importer.config_facts import _EXPERT_KEYS

        counted = set()
        for name in CONFIG_MAPPING:
            module = sys.modules[CONFIG_MAPPING[name].__module__].__file__
            assert module is not None
            for line in Path(module).read_text().splitlines():
                field = line.strip().partition(":")[0]
                if (
                    line.startswith("    ")
                    and ":" in line
                    and field.isidentifier()
                    and field.endswith("experts")
                ):
                    counted.add(field)
        others = {field for field in counted if "shared" in field}
        assert counted - others - {"top_k_experts"} == set(_EXPERT_KEYS)
    finally:
        logging.disable(logging.NOTSET)


def test_both_full_reads_at_once(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    assert hash_of_digests(read_through(folder)) == source_hash(folder)
    sizes = {name: size for name, (size, _) in read_through(folder).items()}
    assert sizes[SECOND] == (folder / SECOND).stat().st_size
    save(folder / SECOND, {"b": np.full((3, 1), np.nan, np.float32)})
    with pytest.raises(SourceError, match="tensor 'b'.*3 NaN"):
        read_through(folder)


def test_a_failure_of_one_reader_ends_the_other(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    seen = []

    class Interrupted(NullProgress):
        @contextmanager
        def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            def step(count: int) -> None:
                seen.append(name)
                raise KeyboardInterrupt

            yield step

    with pytest.raises(KeyboardInterrupt):
        read_through(folder, Interrupted())
    assert seen == ["hash source"]


def test_holes_of_a_sparse_file_are_zeros_and_what_lies_between_is_read(tmp_path: Path) -> None:
    count = 24 << 20  # three blocks of 32 MiB
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    header = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    header += b" " * (-len(header) % 8)
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 4 * count)
    check_finite(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(8 + len(header) + 4 * (count - 5))
        stream.write(np.float32(np.inf).tobytes())
    with pytest.raises(SourceError, match=rf"1 infinite of its values, the first at \[{count - 5}\]"):
        check_finite(tmp_path)
