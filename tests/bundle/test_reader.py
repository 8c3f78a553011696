"""open_bundle: every kind of damage is one clear error, and a sound bundle opens."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_export.bundle import Bundle, open_bundle
from moe_export.bundle.manifest import read_manifest
from moe_export.bundle.tools import installed_version, major_minor, tool_versions
from moe_export.errors import BundleError, MoeExportError
from moe_export.schema import SCHEMA_VERSION, Manifest
from tests.bundle.sample import fill, make_bundle, make_manifest, make_model
from tests.bundle.test_writer import Recorder

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "engine")


def edit_manifest(bundle: Path, edit: Edit) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("trust", [False, True])
def test_sound_bundle_opens(bundle: Path, trust: bool) -> None:
    progress = Recorder()
    opened = open_bundle(str(bundle), trust=trust, progress=progress)
    assert opened.path == bundle
    assert isinstance(opened.manifest, Manifest)
    assert opened.model_path.is_file()
    assert opened.tokenizer_path == bundle / "tokenizer"
    total = sum(entry.size for entry in opened.manifest.files)
    assert progress.stages == ({} if trust else {"check hashes": [total, total]})
    without = dataclasses.replace(opened, manifest=make_manifest(text=None))
    assert without.tokenizer_path is None


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_found(bundle: Path, data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(read_manifest(bundle).files))
    path = bundle / entry.path
    sound = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(sound) - 1))
    broken = bytearray(sound)
    broken[bit // 8] ^= 1 << bit % 8
    path.write_bytes(broken)
    try:
        with pytest.raises(BundleError, match=rf"is damaged: {entry.path} .* has SHA-256 .*--trust"):
            open_bundle(bundle)
    finally:
        path.write_bytes(sound)


def test_trust_skips_the_hash_check_and_nothing_else(bundle: Path) -> None:
    weights = bundle / "weights.bin"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    open_bundle(bundle, trust=True)
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(bundle)
    with weights.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleError, match=r"weights\.bin has 81 bytes instead of 80"):
        open_bundle(bundle, trust=True)


def _hugging_face(p: Path) -> Path:
    p.mkdir()
    (p / "config.json").write_text('{"model_type": "mixtral"}')
    return p


def _with(name: str, text: str = "") -> Callable[[Path], Path]:
    def make(p: Path) -> Path:
        p.mkdir()
        (p / name).write_text(text)
        return p

    return make


def _file(name: str) -> Callable[[Path], Path]:
    return lambda p: _with(name)(p) / name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "x does not exist"),
        (_hugging_face, r"Hugging Face model folder \(model_type 'mixtral'\).*moe-export build .*x -o"),
        (_with("model.onnx"), r"a folder with ONNX files \(model.onnx\), not a moe-export bundle"),
        (_file("model.onnx"), "is an ONNX file, not a moe-export bundle"),
        (_file("manifest.json"), "name its folder, .*x$"),
        (_with("pytorch_model.pt"), "a folder with pytorch_model.pt, not a moe"),
        (lambda p: (p.mkdir(), p)[1], r"an empty folder, not a moe-export bundle \(no manifest.json\)"),
        (lambda p: p.parent / ("n" * 300), "cannot be read.*File name too long"),
        (lambda p: p / "a\0b", "does not exist"),
    ],
    ids=["missing", "hf", "onnx-folder", "onnx-file", "manifest", "other", "empty", "long", "nul"],
)
def test_not_a_bundle_says_what_it_is(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        open_bundle(make(tmp_path / "x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"schema_version": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}", "'schema_version' is missing"),
        (b'{"schema_version": true}', "'schema_version' is missing or not a whole number"),
        (b'{"schema_version": "1"}', "not a whole number"),
        (b'{"schema_version": 0}', "does not exist"),
        (b'{"schema_version": 1}', "missing field 'source'"),
    ],
)
def test_broken_manifest(bundle: Path, content: bytes, message: str) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_newer_schema_asks_for_an_upgrade_even_when_fields_differ(bundle: Path) -> None:
    edit_manifest(bundle, lambda m: (m.update(schema_version=SCHEMA_VERSION + 1, new=1), m.pop("io")))
    with pytest.raises(
        BundleError, match=f"schema version {SCHEMA_VERSION + 1}.*reads up to.*--upgrade moe-exp"
    ):
        open_bundle(bundle, trust=True)


def _set_path(path: str) -> Edit:
    return lambda m: m["files"][0].update(path=path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set_path("/etc/passwd"), "'/etc/passwd' is absolute"),
        (_set_path("C:/x"), "'C:/x' is absolute"),
        (_set_path("../model.onnx"), r"contains '\.\.' as a path part"),
        (_set_path("tokenizer/../../x"), r"contains '\.\.' as a path part"),
        (_set_path("./model.onnx"), "not in normal form"),
        (_set_path("tokenizer//x"), "not in normal form"),
        (_set_path("a\\b"), "contains a backslash"),
        (_set_path("a\0b"), r"control character U\+0000"),
        (_set_path("a\u202eb"), r"control character U\+202E"),
        (_set_path(""), "is empty"),
        (_set_path("manifest.json"), "names the manifest itself"),
        (_set_path("weights.bin"), "is listed twice"),
        (lambda m: m["files"][0].update(size=-1), r"files\[0\].size is -1"),
        (lambda m: m["files"][0].update(size="9"), r"manifest.files\[0\].size: expected int, got '9'"),
        (lambda m: m["files"][0].update(sha256="A" * 64), "not 64 lowercase"),
        (lambda m: m["files"].pop(0), "model_file 'model.onnx' is not among"),
        (lambda m: m.update(model_file="../../x.onnx"), "model_file .* is not among"),
        (lambda m: m["text"].update(tokenizer="../tokenizer"), "no listed file lies in that folder"),
        (lambda m: m.update(dtype="float8"), "dtype 'float8' is unknown"),
        (lambda m: m.update(task="chat"), "task 'chat' is unknown"),
        (lambda m: m.update(extra=1), "unknown field 'extra'"),
        (
            lambda m: m["io"]["inputs"].append(m["io"]["inputs"][0]),
            r"io.inputs\[1\].name 'x' is listed twice",
        ),
        (lambda m: m["io"]["inputs"][0].update(shape=["batch", -4]), "negative dimension"),
        (lambda m: m["limits"].update(max_batch=0), "limits.max_batch is 0"),
        (lambda m: m["source"].update(kind="pickle"), "manifest.source.kind: expected one of"),
    ],
)
def test_hostile_or_wrong_manifest(bundle: Path, edit: Edit, message: str) -> None:
    edit_manifest(bundle, edit)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle, trust=True)


def _link_out(bundle: Path) -> None:
    outside = bundle.parent / "outside.bin"
    (bundle / "weights.bin").rename(outside)
    (bundle / "weights.bin").symlink_to(outside)


def _folder_link_out(bundle: Path) -> None:
    (bundle / "tokenizer").rename(bundle.parent / "tokenizer")
    (bundle / "tokenizer").symlink_to("../tokenizer")


def _fifo(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    os.mkfifo(bundle / "weights.bin")


def _folder(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").mkdir()


def _loop(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to("weights.bin")


def _two(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "model.onnx").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda b: (b / "weights.bin").write_bytes(b"12"), "weights.bin has 2 bytes instead of 80"),
        (lambda b: shutil.rmtree(b / "tokenizer"), "tokenizer/tokenizer.json is missing"),
        (_link_out, "weights.bin is a link that leaves the folder.*cp -rL"),
        (_folder_link_out, "tokenizer/tokenizer.json is a link that leaves the folder"),
        (_fifo, "weights.bin is not a file"),
        (_folder, "weights.bin is not a file"),
        (_loop, "weights.bin cannot be read"),
        (_two, r"model.onnx has 0 bytes instead of \d+; weights.bin is missing"),
    ],
)
def test_damaged_files(bundle: Path, damage: Any, message: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle, trust=True)


def test_links_that_stay_inside_are_fine(bundle: Path, tmp_path: Path) -> None:
    (bundle / ".blobs").mkdir()
    (bundle / "weights.bin").rename(bundle / ".blobs" / "w")
    (bundle / "weights.bin").symlink_to(".blobs/w")
    open_bundle(bundle)
    (tmp_path / "by-link").symlink_to(bundle)
    open_bundle(tmp_path / "by-link")


@pytest.mark.parametrize(
    "extra",
    ["tokenizer/added_tokens.json", "weights2.bin", "model.onnx.data", "x/evidence/a", "tokenizer/.hidden"],
)
def test_unlisted_files_are_refused(bundle: Path, extra: str) -> None:
    (bundle / extra).parent.mkdir(parents=True, exist_ok=True)
    (bundle / extra).write_text("{}")
    with pytest.raises(BundleError, match=f"does not list: '{extra}'; .*evidence/"):
        open_bundle(bundle, trust=True)


def test_unlisted_link_to_a_folder_is_refused(bundle: Path) -> None:
    (bundle / "more").symlink_to("/usr")
    with pytest.raises(BundleError, match="does not list: 'more'"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "extra", ["evidence/parity.json", ".DS_Store", ".git/HEAD", "README.md", "build.lock"]
)
def test_harmless_extras_are_tolerated(bundle: Path, extra: str) -> None:
    (bundle / extra).parent.mkdir(parents=True, exist_ok=True)
    (bundle / extra).write_text("{}")
    open_bundle(bundle)


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("999.0.0", False),
        ("{major}.{next}.0", False),
        ("{major}.{minor}.99", True),
        ("1.0.0", True),
        ("?", True),
    ],
)
def test_runtime_newer_than_the_installed_one(bundle: Path, version: str, fits: bool) -> None:
    installed = major_minor(installed_version("onnxruntime") or "")
    assert installed is not None
    version = version.format(major=installed[0], minor=installed[1], next=installed[1] + 1)
    edit_manifest(bundle, lambda m: m["tools"].update(onnxruntime=version))
    if fits:
        open_bundle(bundle)
        return
    with pytest.raises(
        BundleError, match=f"built for onnxruntime {version}, installed is .*upgrade"
    ) as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)


def test_versions() -> None:
    assert tool_versions()["onnxruntime"] == installed_version("onnxruntime")
    assert "moe-export" in tool_versions() and "python" in tool_versions()
    assert installed_version("no-such-tool") is None
    assert major_minor("1.31.1") == (1, 31)
    assert major_minor("1.32.0.dev20261101+cpu") == (1, 32)
    assert major_minor("2") is None
    assert major_minor("") is None


def test_unlisted_external_data_is_refused(tmp_path: Path) -> None:
    """The model refers to a file that exists, and the manifest does not vouch for it."""
    output = make_bundle(tmp_path / "engine")
    (output / "weights.bin").rename(output / ".weights.bin")
    model = make_model()
    model.graph.initializer[0].external_data[0].value = ".weights.bin"
    content = model.SerializeToString()
    (output / "model.onnx").write_bytes(content)

    def edit(data: dict[str, Any]) -> None:
        data["files"] = [f for f in data["files"] if f["path"] != "weights.bin"]
        data["files"][0]["size"] = len(content)

    edit_manifest(output, edit)
    with pytest.raises(BundleError, match="'.weights.bin' is not among the bundle's listed files"):
        open_bundle(output, trust=True)


def test_hostile_model_in_a_bundle_with_right_hashes(tmp_path: Path) -> None:
    from moe_export.bundle import BundleWriter

    (tmp_path / "secret").write_bytes(bytes(80))
    model = make_model()
    model.graph.initializer[0].external_data[0].value = "../secret"
    with BundleWriter(tmp_path / "engine") as writer:
        fill(writer.path, model)
        writer.commit(make_manifest())
    with pytest.raises(BundleError, match=r"'\.\./secret' contains '\.\.' as a path part"):
        open_bundle(tmp_path / "engine")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in items for place in _places(item, (*at, key)))]


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_manifest_opens_or_is_refused(bundle: Path, data: st.DataObject) -> None:
    """Replace, remove or add anything anywhere: a clear error or an opened bundle, never another
    exception."""
    path = bundle / "manifest.json"
    sound = path.read_text()
    manifest = json.loads(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(_places(manifest)))
        if not place:
            continue
        holder = manifest
        for key in place[:-1]:
            holder = holder[key]
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del holder[place[-1]]
        elif action == "replace":
            holder[place[-1]] = data.draw(JSON)
        elif isinstance(holder, dict):
            holder[data.draw(st.text())] = data.draw(JSON)
    path.write_text(json.dumps(manifest))
    try:
        assert isinstance(open_bundle(bundle), Bundle)
    except MoeExportError as error:
        assert str(error)
    finally:
        path.write_text(sound)
