"""Golden files: CI verifies with them alone, and one that does not fit or is damaged is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_export.bundle.manifest import read_manifest
from moe_export.errors import UsageError
from moe_export.verify import verify_bundle
from moe_export.verify.golden import load_golden
from tests.helpers.tiny_bundle import TinyReference, make_tiny_bundle
from tests.helpers.tiny_model import TinyWeights
from tests.verify import engines


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def golden(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "tiny.npz"
    report = verify_bundle(bundle, against=TinyReference(), save_golden=path, threads=1, seed=5)
    assert report.passed
    return path


def test_round_trip_gives_the_same_verdict_and_numbers(bundle: Path, golden: Path) -> None:
    direct = verify_bundle(bundle, against=TinyReference(), threads=1, seed=5)
    again = verify_bundle(bundle, against=golden, threads=1)
    assert again.passed and again.against == "golden" and again.source == str(golden)
    assert [c.name for c in again.cases] == [c.name for c in direct.cases]
    assert [c.seed for c in again.cases] == [c.seed for c in direct.cases]
    assert again.summary()["max_error"] == pytest.approx(direct.summary()["max_error"])
    assert again.notes == direct.notes


def test_metadata_says_what_it_is(bundle: Path, golden: Path) -> None:
    metadata = load_golden(golden).metadata
    assert metadata["source_hash"] == read_manifest(bundle).source.hash
    assert metadata["seed"] == 5 and metadata["reference_dtype"] == "float32"
    assert {"moe-export", "onnxruntime", "numpy"} <= metadata["tools"].keys()
    with np.load(golden, allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_a_broken_engine_fails_against_a_golden_and_is_named(golden: Path, tmp_path: Path) -> None:
    report = verify_bundle(
        make_tiny_bundle(tmp_path / "b", broken="expert_swapped"), against=golden, threads=1
    )
    assert not report.passed and report.findings[0].experts == (0, 1)


def test_neither_torch_nor_transformers_is_imported(bundle: Path, golden: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "sys.modules['transformers'] = None\n"
        "from moe_export.verify import verify_bundle\n"
        f"report = verify_bundle({str(bundle)!r}, against={str(golden)!r}, threads=1)\n"
        "assert report.passed\n"
        "loaded = {m.partition('.')[0] for m, v in sys.modules.items() if v is not None}\n"
        "print(sorted(loaded & {'torch', 'transformers', 'onnxscript', 'matplotlib'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_another_source_is_refused(golden: Path, tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match=r"another source model.*--save-golden"):
        verify_bundle(other, against=golden)


def test_other_outputs_are_refused(bundle: Path, golden: Path, tmp_path: Path) -> None:
    def change(metadata: dict[str, Any]) -> None:
        metadata["io"]["outputs"] = ["something"]

    with pytest.raises(UsageError, match="other inputs or outputs"):
        verify_bundle(bundle, against=rewritten(golden, tmp_path, change))


def rewritten(golden: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the golden with changed metadata."""
    path = folder / "changed.npz"
    with np.load(golden, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    metadata = json.loads(bytes(arrays["metadata"]))
    change(metadata)
    arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    np.savez(path, **arrays)
    return path


def test_cut_short(bundle: Path, golden: Path, tmp_path: Path) -> None:
    content = golden.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 10):
        path = tmp_path / f"{size}.npz"
        path.write_bytes(content[:size])
        with pytest.raises(UsageError, match=r"damaged|cannot be read|not a golden"):
            verify_bundle(bundle, against=path)


def test_any_flipped_byte_of_the_data_is_noticed(golden: Path, tmp_path: Path) -> None:
    content = bytearray(golden.read_bytes())
    with zipfile.ZipFile(golden) as archive:
        spots = [
            i.header_offset + 60 + i.compress_size // 2 for i in archive.infolist() if i.compress_size > 300
        ]
    assert len(spots) > 10
    for spot in spots[::10]:
        broken = content.copy()
        broken[spot] ^= 0x10
        path = tmp_path / "flipped.npz"
        path.write_bytes(broken)
        with pytest.raises(UsageError, match="damaged"):
            load_golden(path)


def _newer(metadata: dict[str, Any]) -> None:
    metadata["schema_version"] = 99


def _other_format(metadata: dict[str, Any]) -> None:
    metadata["format"] = "something else"


def _missing_array(metadata: dict[str, Any]) -> None:
    metadata["runs"][0]["outputs"]["logits"] = "a9999"


def _wrong_shape(metadata: dict[str, Any]) -> None:
    metadata["arrays"]["a0"]["shape"] = [7]


def _no_cases(metadata: dict[str, Any]) -> None:
    del metadata["cases"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_newer, "schema version 99"),
        (_other_format, "not a golden"),
        (_missing_array, "damaged"),
        (_wrong_shape, "damaged.*its table says"),
        (_no_cases, "damaged"),
    ],
)
def test_wrong_metadata(
    bundle: Path, golden: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        verify_bundle(bundle, against=rewritten(golden, tmp_path, change))


def test_other_files_are_not_goldens(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", x=np.zeros(3))
    with pytest.raises(UsageError, match="not a golden"):
        verify_bundle(bundle, against=tmp_path / "plain.npz")
    np.savez(tmp_path / "object.npz", metadata=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match="damaged"):
        verify_bundle(bundle, against=tmp_path / "object.npz")
    with pytest.raises(UsageError, match="does not exist"):
        verify_bundle(bundle, against=tmp_path / "absent.npz")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"model folder or a golden file"):
        verify_bundle(bundle, against=tmp_path / "notes.txt")


def test_engine_with_smaller_limits_leaves_cases_out_and_says_so(golden: Path, tmp_path: Path) -> None:
    small = make_tiny_bundle(tmp_path / "b", max_batch=1, max_sequence=20)
    report = verify_bundle(small, against=golden, threads=1)
    assert report.passed and {c.name for c in report.cases} == {"one token", "token by token"}
    assert any("'maximum'" in n and "left out" in n for n in report.notes)
    tiny = make_tiny_bundle(tmp_path / "c", max_batch=1, max_sequence=1)
    assert {c.name for c in verify_bundle(tiny, against=golden, threads=1).cases} == {"one token"}


def test_low_precision_engine_against_a_golden_of_its_source(golden: Path, tmp_path: Path) -> None:
    low = engines.bfloat16_weights(TinyWeights.make())
    report = verify_bundle(
        engines.bundle_of(tmp_path / "b", low, dtype="bfloat16"), against=golden, threads=1
    )
    assert report.passed and {c.mode for c in report.cases} == {"free", "forced"}


def test_wrong_use(bundle: Path, golden: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.npz"):
        verify_bundle(bundle, against=TinyReference(), save_golden=tmp_path / "golden.bin")
    with pytest.raises(UsageError, match="golden file brings its own inputs"):
        verify_bundle(bundle, against=golden, text="hello")
    with pytest.raises(UsageError, match="made from the source model"):
        verify_bundle(bundle, against=golden, save_golden=tmp_path / "copy.npz")
    with pytest.raises(UsageError, match="does not record where"):
        verify_bundle(bundle)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        verify_bundle(bundle, against=TinyReference(), save_golden=tmp_path / "file" / "g.npz", threads=1)


def test_writing_replaces_and_leaves_nothing_else(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_text("old")
    verify_bundle(bundle, against=TinyReference(), save_golden=path, threads=1)
    assert load_golden(path).cases
    assert [p.name for p in tmp_path.iterdir()] == ["golden.npz"]
