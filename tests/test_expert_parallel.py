"""What cannot be divided over ranks is refused before the model is traced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_export.config import BuildConfig
from moe_export.errors import UsageError
from moe_export.expert_parallel import check_ranks, divide
from moe_export.schema import ModelIO, MoELayer, TensorSpec


@dataclass(frozen=True)
class Block:
    name: str
    num_experts: int


def config(**options: Any) -> BuildConfig:
    return BuildConfig(verify=False, bench=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ep_mode": "alltoall"}, "needs ep = 2 or more"),
        ({"ep": 2, "target": "portable"}, "portable has no collectives"),
        ({"ep": 2, "quantize": "int8"}, "is for one rank"),
        ({"ep": 2, "ep_overflow": "error"}, "need each other"),
        ({"ep": 2, "ep_overflow": "error", "ep_capacity_factor": 1.5}, "ep_mode alltoall"),
        ({"ep": 2, "placement": "balanced"}, "belong together"),
        ({"ep": 2, "redundant_experts": 1}, "placement balanced"),
        ({"ep": 3, "ep_nodes": 2}, "placement balanced"),
        ({"ep": 3, "ep_nodes": 2, "placement": "balanced", "trace": "t"}, "3 ranks do not lie evenly"),
        (
            {"ep": 2, "ep_overflow": "error", "ep_capacity_factor": 1.5, "ep_mode": "alltoall",
             "target": "tensorrt-rtx", "sm": (89,)},
            "needs target onnxruntime",
        ),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**options)


def test_too_few_experts_are_told_before_any_work(tmp_path: Path) -> None:
    layers = [Block("first", 8), Block("second", 4)]
    check_ranks(config(ep=4), layers)
    check_ranks(config(), [])
    with pytest.raises(UsageError, match="5 ranks for the 4 experts of MoE layer 'second'"):
        check_ranks(config(ep=5), layers)
    with pytest.raises(UsageError, match="no MoE layer"):
        check_ranks(config(ep=2), [])
    broken = tmp_path / "trace.json"
    broken.write_text("{}")
    with pytest.raises(UsageError, match="no list 'layers'"):
        check_ranks(config(ep=5, placement="balanced", trace=str(broken), redundant_experts=1), layers)


def test_only_sequences_can_be_dealt_out() -> None:
    layer = MoELayer(0, "moe", 4, 2, 8, 16, "h", "ids", "w", "o")
    rows = TensorSpec("x", "float32", ("tokens", 8))
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids")
    with pytest.raises(UsageError, match="'x' .* no batch axis first; take allreduce"):
        divide(config(ep=2, ep_mode="alltoall"), "feature-extraction", ModelIO((rows,), (ids,)), [layer])
    plan, _ = divide(config(ep=2, ep_mode="alltoall"), "text-generation", ModelIO((ids,), (ids,)), [layer])
    assert plan is not None and [p.experts for p in plan.layers] == [((0, 1), (2, 3))]
    assert divide(config(), "module", ModelIO((rows,), ()), []) == (None, ())
