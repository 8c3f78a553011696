"""The router kernel under Triton's interpreter against the op's float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moe_export_plugins.gpu.interpret import run_interpreted

from moe_export.costs.tiles import Tile, tiles
from moe_export.errors import InputError, UsageError
from moe_export.ops import router as router_op
from tests.plugins.gpu.kernel_cases import DTYPES, different_ids, error, normal

DEEPSEEK = {
    "score": "sigmoid", "renormalize": 1, "epsilon": 1e-20, "scale": 2.5, "n_group": 4, "topk_group": 2,
    "group_score": "top2_sum", "group_mask": "zero",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "softmax": {"score": "softmax"},
    "softmax renormalised": {"score": "softmax", "renormalize": 1},
    "softmax after top-k": {"score": "softmax_after_topk"},
    "sigmoid scaled": {"score": "sigmoid", "renormalize": 1, "epsilon": 1e-9, "scale": 1.5},
    "sqrtsoftplus": {"score": "sqrtsoftplus", "renormalize": 1},
    "groups by maximum": {"score": "softmax", "n_group": 4, "topk_group": 2, "scale": 16.0},
    "groups of DeepSeek-V3": DEEPSEEK,
    "one expert per group": {
        "score": "sigmoid", "n_group": 12, "topk_group": 7, "group_score": "top2_sum",
    },
}  # fmt: skip


def run(
    logits: Any, attributes: dict[str, Any], bias: Any = None, tile: Tile | None = None
) -> dict[str, Any]:
    constants = {**attributes, "num_experts": logits.shape[1], "biased": int(bias is not None)}
    arrays = {"logits": logits}
    if bias is not None:
        constants["bias_dtype"] = bias.dtype.name
        arrays["selection_bias"] = bias
    return run_interpreted("router", arrays, constants, tile or Tile(4))


def check(logits: Any, attributes: dict[str, Any], bias: Any = None, tile: Tile | None = None) -> None:
    result = run(logits, attributes, bias, tile)
    assert different_ids(result["expert_ids"], logits, bias, attributes) == []
    weights, ids = router_op.reference(logits, bias, **attributes)
    if np.array_equal(ids, result["expert_ids"]):
        assert error(result["weights"], weights) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_scores_groups_and_normalisation(name: str, dtype: str) -> None:
    attributes = {"top_k": 3, **CASES[name]}
    check(normal(1, (9, 12), dtype, 2.0), attributes)


@pytest.mark.parametrize("name", ["softmax", "sqrtsoftplus", "groups by maximum", "groups of DeepSeek-V3"])
@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16"])
def test_selection_bias(name: str, bias_dtype: str) -> None:
    attributes = {"top_k": 3, "biased": 1, **CASES[name]}
    check(normal(2, (7, 12), "float32"), attributes, normal(3, (12,), bias_dtype, 0.3))


@pytest.mark.parametrize("tile", tiles("router", "float32"), ids=str)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5), (7, 1), (60, 4)])
def test_odd_numbers_of_experts(experts: int, top_k: int, tile: Tile) -> None:
    for tokens in (0, 1, 3):
        check(normal(4, (tokens, experts), "float32"), {"top_k": top_k, "renormalize": 1}, None, tile)


@pytest.mark.parametrize("name", CASES)
def test_equal_values_go_to_the_lower_id(name: str) -> None:
    attributes = {"top_k": 4, **CASES[name]}
    logits = np.zeros((3, 12), np.float32)
    logits[1, ::2] = 1.0
    logits[2, 5] = -0.0
    wanted = router_op.reference(logits, None, **attributes)[1]
    assert np.array_equal(run(logits, attributes)["expert_ids"], wanted)


def test_masked_experts_and_extreme_logits() -> None:
    logits = normal(5, (4, 12), "float32")
    logits[0, 3:] = -np.inf
    logits[1] = -1e4 * np.arange(12)
    logits[2] = 80.0
    logits[3, 4] = 1e30
    for score in ("softmax", "softmax_after_topk"):
        check(logits, {"top_k": 5, "score": score})


def test_small_scores_of_sqrtsoftplus_keep_their_digits() -> None:
    logits = np.array([[-30.0, -20.0, -25.0, -40.0]], np.float32)
    attributes = {"top_k": 4, "score": "sqrtsoftplus", "renormalize": 1}
    result = run(logits, attributes)
    weights, ids = router_op.reference(logits, None, **attributes)
    assert np.array_equal(result["expert_ids"], ids)
    assert np.allclose(result["weights"], weights, rtol=1e-5, atol=0)


def test_the_comparison_sees_a_wrong_expert() -> None:
    logits = normal(6, (5, 12), "float32")
    ids = run(logits, {"top_k": 3})["expert_ids"]
    assert different_ids(ids, logits, None, {"top_k": 3}) == []
    ids[2, 0], ids[2, 1] = ids[2, 1], ids[2, 0]
    assert different_ids(ids, logits, None, {"top_k": 3}) == [(2, 0), (2, 1)]
    ids[2, 1] = ids[2, 0]
    assert different_ids(ids, logits, None, {"top_k": 3}) == [(2, 0)]  # the same expert twice


def test_refusals() -> None:
    logits = normal(7, (2, 12), "float32")
    with pytest.raises(UsageError, match="capacity is not 0.*one launch"):
        run(logits, {"top_k": 1, "capacity": 2})
    with pytest.raises(UsageError, match="top_k is 13; expected at most num_experts, 12"):
        run(logits, {"top_k": 13})
    with pytest.raises(UsageError, match="n_group is 5; expected a divisor"):
        run(logits, {"top_k": 1, "n_group": 5})
    with pytest.raises(InputError, match=r"input logits is float64 \[2, 12\]; expected"):
        wide = {"logits": logits.astype(np.float64)}
        run_interpreted("router", wide, {"num_experts": 12, "top_k": 1}, Tile(4), dtype="float32")
