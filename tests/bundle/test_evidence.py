"""Evidence added to a bundle in place, and the cache key."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from moe_export.bundle import cache_key, find_unchanged, open_bundle, save_evidence
from moe_export.bundle.lock import output_lock
from moe_export.config import BuildConfig
from moe_export.errors import BundleError, UsageError
from moe_export.schema import SourceInfo
from tests.bundle.sample import child, make_bundle, names


def test_evidence_is_listed_hashed_and_replaced(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "engine", evidence={"bench": {"speedup": 2.0}})
    bundle = save_evidence(open_bundle(path), {"parity.json": b"{}"}, {"parity": {"passed": True}})
    assert bundle.manifest.evidence == {"bench": {"speedup": 2.0}, "parity": {"passed": True}}
    assert "evidence/parity.json" in [entry.path for entry in bundle.manifest.files]
    bundle = save_evidence(bundle, {"parity.json": b'{"a": 1}', "plot.svg": b"<svg/>"}, {"parity": {}})
    assert bundle.manifest.evidence["parity"] == {}
    assert open_bundle(path).manifest == bundle.manifest
    assert names(path / "evidence") == ["parity.json", "plot.svg"]
    assert names(tmp_path) == ["engine"]
    (path / "evidence" / "parity.json").write_bytes(b'{"a": 2}')
    with pytest.raises(BundleError, match=r"damaged: evidence/parity\.json"):
        open_bundle(path)
    save_evidence(open_bundle(path, trust=True), {"parity.json": b'{"a": 3}'})
    open_bundle(path)


KILLED = """
from moe_export.bundle import evidence, manifest, open_bundle, save_evidence
replace_file, left = manifest.replace_file, [int(sys.argv[2])]
def replace_or_die(path, content):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    replace_file(path, content)
manifest.replace_file = evidence.replace_file = replace_or_die
save_evidence(open_bundle(sys.argv[1]), {"parity.json": b"[3]", "more.json": b"[4]"}, {"parity": "new"})
"""


def test_killed_at_any_moment_the_bundle_still_opens(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "engine")
    for step in range(5):
        save_evidence(open_bundle(path), {"parity.json": b"[1]", "more.json": b"[2]"}, {"parity": "old"})
        process = child(KILLED, path, step)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if step < 4 else 0), errors
        manifest = open_bundle(path).manifest
        assert manifest.evidence["parity"] == ("old" if step < 4 else "new")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\nb"])
def test_evidence_names(tmp_path: Path, name: str) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "engine"))
    with pytest.raises(BundleError, match="evidence file name"):
        save_evidence(bundle, {name: b""})


def test_refused_evidence_changes_nothing(tmp_path: Path) -> None:
    bundle = save_evidence(open_bundle(make_bundle(tmp_path / "engine")), {"parity.json": b"1"})
    with pytest.raises(BundleError, match=r"evidence\.parity\.max is inf"):
        save_evidence(bundle, {"parity.json": b"2"}, {"parity": {"max": float("inf")}})
    assert open_bundle(bundle.path).manifest == bundle.manifest
    with output_lock(bundle.path.resolve()), pytest.raises(UsageError, match="is writing to"):
        save_evidence(bundle, {"parity.json": b"2"})
    (bundle.path / "evidence" / "parity.json").unlink()
    (bundle.path / "evidence").rmdir()
    (bundle.path / "evidence").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="is a link"):
        save_evidence(bundle, {"parity.json": b"2"})
    assert names(tmp_path) == ["engine"]


def test_cache_key_is_stable_and_sees_every_change() -> None:
    options = BuildConfig().key_fields()
    tools = {"torch": "2.13.0"}
    key = cache_key("ab", {"a": 1, "b": [1.5, None]}, tools)
    assert key == "14aaa2319c81f16cd43fbbdd3a0e9c04c69e34c6b8ea29f6673bad1e1796dcc9"
    assert key == cache_key("ab", {"b": (1.5, None), "a": 1}, dict(tools))
    keys = {
        cache_key("ab", options, tools),
        cache_key("ac", options, tools),
        cache_key("ab", options, {"torch": "2.13.1"}),
        cache_key("ab", BuildConfig(seed=1).key_fields(), tools),
        cache_key("ab", BuildConfig(dtype="float16").key_fields(), tools),
        cache_key("ab", BuildConfig(tolerances={"logits": 1}).key_fields(), tools),
        cache_key("ab", options),
    }
    assert len(keys) == 7
    same = cache_key("ab", BuildConfig(overwrite=True).key_fields(), tools)
    assert same == cache_key("ab", options, tools)
    source = SourceInfo("module", None, "own", "Net", "00")
    assert cache_key("ab", {"source": source}, tools) != cache_key("ab", {}, tools)
    for value in (float("nan"), Path("x"), {1, 2}):
        with pytest.raises(UsageError, match="cache key.options.x is"):
            cache_key("ab", {"x": value}, tools)


def test_unchanged_build_is_found(tmp_path: Path) -> None:
    key = cache_key("ab", {})
    assert find_unchanged(tmp_path / "engine", key) is None
    path = make_bundle(tmp_path / "engine", evidence={"cache_key": key})
    found = find_unchanged(path, key)
    assert found is not None and found.path == path
    assert find_unchanged(path, cache_key("ac", {})) is None
    (path / "weights.bin").write_bytes(bytes(80))
    assert find_unchanged(path, key) is None
    (path / "manifest.json").write_text(json.dumps({"evidence": []}))
    assert find_unchanged(path, key) is None
