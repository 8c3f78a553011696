"""A bundle's placement on counted loads, and `moe-export trace --placement-of`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moe_export.bundle.manifest import read_manifest
from moe_export.bundle.manifest import write_manifest as write
from moe_export.cli.main import cli
from moe_export.errors import UsageError
from moe_export.inspect.placement_use import placement_use
from moe_export.inspect.usage import LayerUsage, Usage
from moe_export.placement import contiguous, rank_loads
from moe_export.schema import ExpertParallel, LayerPlacement
from tests.helpers.tiny_bundle import make_tiny_bundle

LAYERS = tuple(LayerPlacement(i, ((0, 1, 2), (1, 3))) for i in range(2))
PARALLEL = ExpertParallel(2, "allreduce", placement="balanced", redundant_experts=1, layers=LAYERS)
WINDOWS = np.array([[10, 30, 0, 20], [30, 10, 10, 10]], np.int32)


def usage(layers: int = 2, windows: np.ndarray = WINDOWS) -> Usage:
    counts = windows.sum(axis=0).astype(np.int64)
    found = (LayerUsage(i, f"l{i}", counts, counts * 0.5, 0, windows) for i in range(layers))
    return Usage(60, tuple(found), 30, len(windows))


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    """A bundle whose manifest says that it is divided over two ranks; none of them is run here."""
    folder = make_tiny_bundle(tmp_path / "ranked")
    write(folder, dataclasses.replace(read_manifest(folder), expert_parallel=PARALLEL))
    return folder


def test_both_placements_overall_and_by_window() -> None:
    use = placement_use(usage(), "b", PARALLEL)
    assert [layer.index for layer in use.layers] == [0, 1]
    first = use.layers[0]
    # All: expert loads 40, 40, 10, 30; in order 80 and 40; placed 40 + 20 + 10 and 20 + 30.
    assert first.contiguous is not None
    assert first.contiguous.overall == pytest.approx(80 / 60)
    assert first.placed.overall == pytest.approx(70 / 60)
    # Windows: placed 25 and 35 of 60; 45 and 15.
    assert first.placed.by_window.max == pytest.approx(45 / 30)
    assert first.placed.by_window.p50 == pytest.approx((35 / 30 + 45 / 30) / 2)
    assert json.dumps(use.to_dict(), allow_nan=False)


def test_more_ranks_than_experts_have_no_contiguous_placement() -> None:
    layers = (LayerPlacement(0, ((0,), (1,), (0,))),)
    use = placement_use(
        usage(1, np.array([[2, 1]], np.int32)), "b", ExpertParallel(3, "alltoall", layers=layers)
    )
    assert use.layers[0].contiguous is None
    assert use.to_dict()["layers"][0]["contiguous"] is None


def test_wrong_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="places the experts of 2 MoE layers, the traced model has 1"):
        placement_use(usage(1), "b", PARALLEL)
    with pytest.raises(UsageError, match="places 4 experts in layer 0, the traced model has 5"):
        placement_use(usage(2, np.zeros((1, 5), np.int32)), "b", PARALLEL)
    with pytest.raises(UsageError, match="not an expert-parallel bundle"):
        placement_use(usage(), make_tiny_bundle(tmp_path / "one"))


def test_trace_tells_the_imbalance_of_a_placement(ranked: Path, tmp_path: Path) -> None:
    model = make_tiny_bundle(tmp_path / "model")
    (tmp_path / "held.txt").write_text("def held_out(x):\n    return x * 3\n" * 4)
    args = ["trace", str(model), "--data", str(tmp_path / "held.txt"), "--window", "16", "-q"]
    result = CliRunner().invoke(cli, [*args, "--placement-of", str(ranked), "--json", "-"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["placement"]["ranks"] == 2
    for layer, counted in zip(told["placement"]["layers"], told["layers"], strict=True):
        counts = np.array(counted["counts"])
        for name, placement in (("placed", LAYERS[0]), ("contiguous", contiguous([4], 2)[0])):
            loads = rank_loads(placement, counts)
            assert layer[name]["max_over_mean"] == pytest.approx(loads.max() / loads.mean())
            assert layer[name]["by_window"]["max"] >= layer[name]["by_window"]["p50"]
    shown = CliRunner().invoke(cli, [*args, "--placement-of", str(ranked)])
    assert "busiest rank over the mean of 2 ranks" in shown.stdout
    assert "(balanced, 1 redundant experts)" in shown.stdout
    refused = CliRunner().invoke(cli, [*args, "--placement-of", str(model)])
    assert refused.exit_code == 2
    assert "not an expert-parallel bundle" in refused.stderr
    plain = CliRunner().invoke(cli, [*args, "--json", "-"])
    assert "placement" not in json.loads(plain.stdout)
