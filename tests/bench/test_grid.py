"""Which workloads are measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moe_export.bench.grid import Workload, make_grid
from moe_export.bench.inputs import InputMaker
from moe_export.bench.routing import ROUTINGS
from moe_export.bundle.manifest import read_manifest
from moe_export.errors import UsageError
from moe_export.schema import Manifest
from tests.helpers.tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("grid") / "tiny")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def test_phases_by_batch_by_sequence_then_forced_routings(manifest: Manifest) -> None:
    grid = make_grid(manifest, (2, 1), (16, 8), 4, ROUTINGS)
    assert [w.text for w in grid.workloads] == [
        "prefill 1x8", "prefill 1x16", "prefill 2x8", "prefill 2x16",
        "decode 1x8", "decode 1x16", "decode 2x8", "decode 2x16",
        "prefill 1x16 uniform", "prefill 1x16 zipf", "prefill 1x16 one-hot",
        "prefill 2x16 uniform", "prefill 2x16 zipf", "prefill 2x16 one-hot",
    ]  # fmt: skip
    assert grid.left_out == ()
    assert [grid.workloads[i].tokens for i in (3, 7)] == [32, 2]


def test_cells_beyond_the_limits_are_named(manifest: Manifest) -> None:
    grid = make_grid(manifest, (1, 9), (8, 61, 65), 4, ("real",))
    assert [w.text for w in grid.workloads] == ["prefill 1x8", "prefill 1x61", "decode 1x8"]
    reasons = dict(grid.left_out)
    assert "maximum batch is 8" in reasons["prefill 9x8"]
    assert "61 tokens and 4 decoded ones exceed the bundle's maximum sequence of 64" in reasons["decode 1x61"]
    assert "65 tokens exceed" in reasons["prefill 1x65"]


def test_forced_routing_uses_the_longest_sequence_that_fits(manifest: Manifest) -> None:
    grid = make_grid(manifest, (1,), (8, 32, 1000), 4, ("zipf",))
    assert [w.text for w in grid.workloads] == ["prefill 1x32 zipf"]


def test_a_model_without_experts_has_no_forced_routing(manifest: Manifest) -> None:
    grid = make_grid(dataclasses.replace(manifest, moe_layers=()), (1,), (8,), 4, ROUTINGS)
    assert {w.routing for w in grid.workloads} == {"real"}
    assert grid.left_out == (("routing uniform, zipf, one-hot", "the model has no MoE layer"),)


def test_without_a_cache_there_is_one_phase(tmp_path: Path) -> None:
    manifest = read_manifest(make_tiny_bundle(tmp_path / "plain", cache=False))
    assert [w.phase for w in make_grid(manifest, (1,), (8,), 4, ("real",)).workloads] == ["forward"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (((), (8,), 4, ("real",)), "batch: expected whole numbers"),
        (((1,), (0,), 4, ("real",)), "sequence: expected whole numbers"),
        (((1,), (True,), 4, ("real",)), "sequence: expected whole numbers"),
        (((1,), (8,), 0, ("real",)), "decode_tokens"),
        (((1,), (8,), 4, ("ziff",)), "nearest: zipf"),
        (((1,), (8,), 4, ()), "routing: none given"),
        (((1,), (65,), 4, ("real",)), "no workload is left to measure: 65 tokens"),
    ],
)
def test_nonsense_is_refused(manifest: Manifest, arguments: tuple, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError, match=text):
        make_grid(manifest, *arguments)


def test_inputs_are_text_where_there_is_a_tokenizer(folder: Path, manifest: Manifest) -> None:
    maker = InputMaker(manifest, folder / "tokenizer", seed=0)
    assert maker.described == "text"
    made = maker.inputs(Workload("decode", 2, 16), 4)
    assert made["input_ids"].shape == (2, 16) and made["next_ids"].shape == (2, 4)
    assert bytes(made["input_ids"][0].tolist()).decode() == "The ferry left t"
    assert bytes(made["next_ids"][0].tolist()).decode() == "he h"
    assert (made["input_ids"][0] != made["input_ids"][1]).any()


def test_inputs_are_seeded_random_values_otherwise(manifest: Manifest) -> None:
    maker, again, other = (InputMaker(manifest, None, seed) for seed in (3, 3, 4))
    workload = Workload("prefill", 2, 16)
    assert maker.described == "random values"
    assert (maker.inputs(workload, 4)["input_ids"] == again.inputs(workload, 4)["input_ids"]).all()
    assert (maker.inputs(workload, 4)["input_ids"] != other.inputs(workload, 4)["input_ids"]).any()
