"""build(): a bundle that verifies, is built once, is never half there; a failed one keeps its evidence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_export
from moe_export.backends.portable import PortableBackend
from moe_export.bundle.reader import Bundle, open_bundle
from moe_export.errors import CheckFailed, UsageError

SOURCE = f"{Path(__file__).resolve().parent.parent}/examples/noisy_top_k/model.py:build"
OPTIONS: dict[str, Any] = {"bench": False, "threads": 1}


class Recorder:
    """Keeps what a build says."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Any]:
        self.stages.append(name)
        yield lambda _count=1: None

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Recorder]:
    """The noisy top-k example, built and verified once for all tests; not to be changed."""
    progress = Recorder()
    output = tmp_path_factory.mktemp("api") / "engine"
    return moe_export.build(SOURCE, output, progress=progress, **OPTIONS), progress


@pytest.fixture
def copy(built: tuple[Bundle, Recorder], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0].path, tmp_path / "engine"))


def never(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("the source was loaded")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_bundle_opens_and_says_what_it_holds(built: tuple[Bundle, Recorder]) -> None:
    manifest = open_bundle(built[0].path).manifest
    assert (manifest.source.kind, manifest.task, manifest.target) == ("module", "module", "onnxruntime")
    assert [spec.shape for spec in manifest.io.inputs] == [("batch", "time", 16)]
    assert [(layer.num_experts, layer.top_k) for layer in manifest.moe_layers] == [(8, 4)]
    assert manifest.decisions and all(decision.reason for decision in manifest.decisions)
    assert manifest.evidence["parity"]["passed"] is True
    assert {"evidence/report.html", "evidence/parity.json"} <= {file.path for file in manifest.files}


def test_only_the_bundle_is_left(built: tuple[Bundle, Recorder]) -> None:
    assert [p.name for p in built[0].path.parent.iterdir() if not p.name.endswith(".lock")] == ["engine"]


def test_it_verifies_again_and_runs_as_the_model_does(built: tuple[Bundle, Recorder]) -> None:
    from moe_export.importer.sources import load_source

    report = moe_export.verify(built[0].path, against=SOURCE)
    assert report.passed, report.summary()
    model = load_source(SOURCE).module
    frames = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), moe_export.load(built[0].path) as session:
        got = session.run({"frames": frames.numpy()})["output"]
        assert abs(got - model(frames).numpy()).max() < 1e-5
        assert abs(got - model(frames * 1.01).numpy()).max() > 1e-4


def test_an_unchanged_build_is_a_cache_hit(built: tuple[Bundle, Recorder]) -> None:
    before = contents(built[0].path)
    progress = Recorder()
    again = moe_export.build(SOURCE, built[0].path, progress=progress, **OPTIONS)
    assert any("is unchanged" in note for note in progress.notes)
    assert not any("is unchanged" in note for note in built[1].notes)
    assert "trace" in built[1].stages and "trace" not in progress.stages
    assert again.manifest == built[0].manifest
    assert contents(built[0].path) == before


def test_other_options_do_not_replace_a_bundle_unasked(copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(UsageError, match="exists already.*--overwrite"):
        moe_export.build(SOURCE, copy, **{**OPTIONS, "seed": 1})
    assert contents(copy) == before


def test_a_damaged_bundle_is_no_cache_hit(copy: Path) -> None:
    with (copy / "evidence" / "parity.json").open("a", encoding="utf-8") as stream:
        stream.write(" ")
    with pytest.raises(UsageError, match="exists already"):
        moe_export.build(SOURCE, copy, **OPTIONS)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_bundle_is_refused_before_the_source_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    monkeypatch.setattr("moe_export.importer.sources.load_source", never)
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match="overwrite"):
        moe_export.build(SOURCE, output, overwrite=overwrite, **OPTIONS)
    assert contents(output) == {"chapter.tex": b"years of work"}
    with pytest.raises(AssertionError, match="the source was loaded"):
        moe_export.build(SOURCE, tmp_path / "free", **OPTIONS)


@pytest.mark.slow
def test_overwrite_replaces_a_bundle(copy: Path) -> None:
    (copy / "stale.txt").write_text("of the old bundle", encoding="utf-8")
    moe_export.build(SOURCE, copy, overwrite=True, verify=False, max_batch=3, **OPTIONS)
    assert open_bundle(copy).manifest.limits.max_batch == 3
    assert not (copy / "stale.txt").exists() and not (copy / "evidence").exists()


def test_max_sequence_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from moe_export.api import _max_sequence
    from moe_export.config import BuildConfig
    from moe_export.importer.sources import load_source
    from moe_export.models.families import tiny_model

    loaded = load_source(tiny_model("mixtral"))
    limit = loaded.module.config.max_position_embeddings
    assert _max_sequence(loaded, BuildConfig()) == limit
    assert _max_sequence(loaded, BuildConfig(bench=False, max_sequence=limit)) == limit
    assert _max_sequence(loaded, BuildConfig(bench=False, max_sequence=limit - 1)) == limit - 1
    with pytest.raises(UsageError, match=f"max_sequence: {limit + 1} is beyond the {limit} positions"):
        _max_sequence(loaded, BuildConfig(bench=False, max_sequence=limit + 1))
    own: Any = SimpleNamespace(kind="module", module=torch.nn.Linear(2, 2))
    assert _max_sequence(own, BuildConfig(bench=False, max_sequence=limit + 1)) == limit + 1


@pytest.mark.slow
def test_failing_parity_raises_and_leaves_the_bundle_with_its_evidence(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    options = {**OPTIONS, "tolerances": {"output": 1e-30}}
    with pytest.raises(CheckFailed, match=r"parity with the source failed.*report\.html"):
        moe_export.build(SOURCE, output, **options)
    bundle = open_bundle(output)
    assert bundle.manifest.evidence["parity"]["passed"] is False
    parity = json.loads((output / "evidence" / "parity.json").read_text(encoding="utf-8"))
    assert parity["passed"] is False and parity["bundle"] == str(output)
    assert (output / "evidence" / "report.html").stat().st_size > 1000
    with pytest.raises(CheckFailed, match="parity with the source failed"):  # the cache hit says so as well
        moe_export.build(SOURCE, output, **options)


@pytest.mark.slow
def test_an_error_while_lowering_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    class Failing(PortableBackend):
        def build(self, exported: Any, folder: Path, options: Any) -> Any:
            (folder / "model.onnx").write_bytes(b"half a model")
            seen.append(folder)
            raise RuntimeError("no lowering today")

    monkeypatch.setattr("moe_export.backends.get_backend", lambda _target: Failing())
    with pytest.raises(RuntimeError, match="no lowering today"):
        moe_export.build(SOURCE, tmp_path / "engine", **OPTIONS)
    assert len(seen) == 1 and seen[0].parent == tmp_path
    assert all(p.name.endswith(".lock") for p in tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("no trace today"), KeyboardInterrupt()])
def test_an_error_while_tracing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    partial: list[str] = []

    def fails(*_args: Any, **_kwargs: Any) -> Any:
        partial.extend(p.name for p in tmp_path.iterdir() if p.is_dir())
        raise error

    monkeypatch.setattr("moe_export.importer.export.export_model", fails)
    with pytest.raises(type(error)):
        moe_export.build(SOURCE, tmp_path / "engine", **OPTIONS)
    assert len(partial) == 1 and partial[0] != "engine"
    assert all(p.name.endswith(".lock") for p in tmp_path.iterdir())


def test_an_error_while_replacing_leaves_the_old_bundle(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(copy)

    def fails(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("no trace today")

    monkeypatch.setattr("moe_export.importer.export.export_model", fails)
    with pytest.raises(RuntimeError, match="no trace today"):
        moe_export.build(SOURCE, copy, overwrite=True, **{**OPTIONS, "seed": 2})
    assert contents(copy) == before
    assert open_bundle(copy).manifest.evidence["parity"]["passed"] is True


def test_an_unknown_option_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown build option 'target_name'; nearest: target"):
        moe_export.build(SOURCE, tmp_path / "engine", target_name="portable")
    assert not list(tmp_path.iterdir())


def test_a_live_model_is_left_in_the_mode_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []

    def fails(loaded: Any, **_options: Any) -> Any:
        modes.extend(module.training for module in loaded.module.modules())
        raise RuntimeError("no trace today")

    monkeypatch.setattr("moe_export.importer.export.export_model", fails)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[0].eval()
    with pytest.raises(RuntimeError, match="no trace today"):
        moe_export.build(
            model, tmp_path / "engine", inputs={"input": torch.zeros(2, 2)}, dynamic={}, bench=False
        )
    assert modes == [False] * 3
    assert [module.training for module in model.modules()] == [True, False, True]


def test_too_long_a_sequence_is_refused_before_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_export.models.families import tiny_model

    monkeypatch.setattr("moe_export.importer.export.export_model", never)
    with pytest.raises(UsageError, match="max_sequence: 100000 is beyond"):
        moe_export.build(tiny_model("mixtral"), tmp_path / "engine", bench=False, max_sequence=100000)
    assert all(p.name.endswith(".lock") for p in tmp_path.iterdir())
