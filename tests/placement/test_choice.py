"""The placement of a configuration: trace files, decisions, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_export.config import BuildConfig
from moe_export.errors import UsageError
from moe_export.placement import imbalance, placement_from_config, read_load_trace
from moe_export.schema import MoELayer

SKEWED = [40, 30, 10, 8, 5, 4, 2, 1]


def layer(index: int = 3, experts: int = 8, groups: int = 1) -> MoELayer:
    router = {"n_group": groups} if groups > 1 else None
    return MoELayer(index, f"layers.{index}.moe", experts, 2, 4, 8, "h", "i", "w", "o", router=router)


def trace(folder: Path, *layers: Any, tokens: Any = 50, **more: Any) -> str:
    content = {"tokens": tokens, "layers": [{"counts": c, "dropped": 0, **more} for c in layers]}
    (folder / "trace.json").write_text(json.dumps(content))
    return str(folder / "trace.json")


def test_contiguous_needs_no_trace() -> None:
    placed, decisions = placement_from_config(BuildConfig(ep=3), [layer(2), layer(5, 7)])
    assert [p.index for p in placed] == [2, 5]
    assert placed[1].experts == ((0, 1), (2, 3), (4, 5, 6))
    assert [d.choice for d in decisions] == ["contiguous", "contiguous"]
    with pytest.raises(UsageError, match="9 ranks for 8 experts"):
        placement_from_config(BuildConfig(ep=9), [layer()])


def test_balanced_says_what_it_gains(tmp_path: Path) -> None:
    file = trace(tmp_path, SKEWED, SKEWED[::-1])
    config = BuildConfig(ep=4, placement="balanced", trace=file, redundant_experts=4)
    placed, decisions = placement_from_config(config, [layer(1), layer(4)])
    assert [p.index for p in placed] == [1, 4]
    assert imbalance(placed[0], SKEWED) < 1.1
    assert decisions[0].subject == "layers.1.moe: placement"
    after, before = imbalance(placed[0], SKEWED), 70 / 25
    assert f"busiest rank {after:.3f} x the mean load on the trace (50 tokens)" in decisions[0].reason
    assert f"contiguous {before:.3f} x" in decisions[0].reason
    assert "replicas: expert 0" in decisions[0].reason
    assert decisions[0].alternatives[0].choice == "contiguous"


def test_machines_and_groups(tmp_path: Path) -> None:
    file = trace(tmp_path, SKEWED)
    config = BuildConfig(ep=4, placement="balanced", trace=file, ep_nodes=2)
    placed, decisions = placement_from_config(config, [layer(groups=4)])
    assert "4 groups of experts stay on one machine" in decisions[0].reason
    for first in range(0, 8, 2):
        own = {first, first + 1}
        assert len({r // 2 for r, held in enumerate(placed[0].experts) if own & set(held)}) == 1
    _, decisions = placement_from_config(config, [layer()])
    assert "balanced over all ranks" in decisions[0].reason


def test_replicas_left_out_are_told(tmp_path: Path) -> None:
    file = trace(tmp_path, [25, 25, 25, 25])
    config = BuildConfig(ep=2, placement="balanced", trace=file, redundant_experts=1)
    _, decisions = placement_from_config(config, [layer(experts=4)])
    assert "1 of 1 redundant slots left out" in decisions[0].reason


@pytest.mark.parametrize(
    ("layers", "tokens", "message"),
    [
        ([SKEWED], 50, "another model: it has 1 MoE layers, the model has 2"),
        ([SKEWED, SKEWED[1:]], 50, "layer 1 chose 1.2 of 7 experts per token, the model chooses 2 of 8"),
        ([SKEWED, SKEWED], 100, "layer 0 chose 1 of 8"),
        ([SKEWED, [1.5] * 8], 50, "layer 1 has no list 'counts'"),
        ([SKEWED, []], 50, "layer 1 has no list 'counts'"),
        ([SKEWED, [True] * 8], 50, "layer 1 has no list 'counts'"),
        ([SKEWED, SKEWED], 0, "'tokens' is 0"),
    ],
)
def test_wrong_traces(tmp_path: Path, layers: list[Any], tokens: int, message: str) -> None:
    file = trace(tmp_path, *layers, tokens=tokens)
    config = BuildConfig(ep=2, placement="balanced", trace=file)
    with pytest.raises(UsageError, match=message):
        placement_from_config(config, [layer(0), layer(1)])


def test_dropped_choices_count(tmp_path: Path) -> None:
    file = trace(tmp_path, SKEWED, tokens=60, dropped=20)
    placed, _ = placement_from_config(BuildConfig(ep=2, placement="balanced", trace=file), [layer()])
    assert imbalance(placed[0], SKEWED) < 1.05
    with pytest.raises(UsageError, match="'dropped' is -1"):
        read_load_trace(Path(trace(tmp_path, SKEWED, dropped=-1)))
