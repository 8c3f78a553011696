"""Inputs of each op: ordinary ones and edges: no token, one expert, all experts, dropped and foreign ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.ops.packing import pack_down, pack_up
from moe_export.ops.quantization import quantize
from moe_export.ops.quantized_packing import pack_quantized_down, pack_quantized_up

from .one_op import NUMPY

SIZES = ((0, 2, 4), (1, 1, 1), (1, 2, 4), (7, 2, 4), (5, 4, 4), (40, 3, 16))
"""Tokens, experts per token, experts."""

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax renormalised": {"renormalize": 1},
    "softmax scaled": {"scale": 2.5},
    "softmax groups": {"n_group": 2, "topk_group": 1},
    "softmax groups, others zero": {"n_group": 4, "topk_group": 2, "group_mask": "zero"},
    "softmax bias": {"biased": 1},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid renormalised scaled": {"score": "sigmoid", "renormalize": 1, "epsilon": 1e-20, "scale": 2.5},
    "deepseek v3": {
        "score": "sigmoid",
        "renormalize": 1,
        "epsilon": 1e-20,
        "scale": 2.5,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "top2_sum",
        "group_mask": "zero",
        "biased": 1,
    },
    "sigmoid groups": {
        "score": "sigmoid",
        "n_group": 2,
        "topk_group": 1,
        "group_score": "top2_sum",
        "biased": 1,
    },
    "top-k then softmax": {"score": "softmax_after_topk"},
    "top-k then softmax bias": {"score": "softmax_after_topk", "biased": 1},
    "sqrtsoftplus": {"score": "sqrtsoftplus", "renormalize": 1, "scale": 1.5, "biased": 1},
    "switch": {"capacity": 2},
    "capacity of top-2": {"capacity": 3, "renormalize": 1},
}
"""Every parametrisation of the router that a family uses, and more."""

EXPERTS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "interleaved": {"layout": "interleaved"},
    "gpt-oss": {
        "activation": "clamped_swiglu",
        "layout": "interleaved",
        "transposed": 1,
        "biased": 1,
        "limit": 1.5,
    },
    "relu2 ungated": {"activation": "relu2", "gated": 0},
    "relu ungated biased": {"activation": "relu", "gated": 0, "biased": 1},
    "gelu": {"activation": "gelu"},
    "gelu tanh biased": {"activation": "gelu_tanh", "biased": 1},
    "packed": {"packed": 1},
    "packed ungated": {"packed": 1, "activation": "relu", "gated": 0},
    "packed biased": {"packed": 1, "activation": "clamped_swiglu", "biased": 1, "limit": 1.5},
}


QUANTIZED_EXPERTS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "swiglu, 4 bits": {"bits": 4},
    "small blocks": {"block": 16},
    "large blocks, 4 bits": {"block": 64, "bits": 4},
    "gpt-oss, 4 bits": {"activation": "clamped_swiglu", "biased": 1, "limit": 1.5, "bits": 4},
    "relu2 ungated": {"activation": "relu2", "gated": 0},
    "relu ungated biased, 4 bits": {"activation": "relu", "gated": 0, "biased": 1, "bits": 4, "block": 16},
    "gelu": {"activation": "gelu"},
    "gelu tanh biased": {"activation": "gelu_tanh", "biased": 1},
}


def expert_ids(tokens: int, top_k: int, experts: int, *, strangers: bool = True) -> NDArray[np.int32]:
    """[T, K]; with ``strangers`` also dropped ids and ids of experts that are not ours."""
    rng = np.random.default_rng([tokens, top_k, experts])
    if strangers:
        return rng.integers(-3, experts + 3, (tokens, top_k)).astype(np.int32)
    rows = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
    return np.asarray(rows, np.int32).reshape(tokens, top_k)


def routings() -> Iterator[tuple[NDArray[np.int32], int]]:
    """Expert ids and the number of experts: spread, one expert takes all, all dropped, all foreign."""
    for tokens, top_k, experts in SIZES:
        yield expert_ids(tokens, top_k, experts), experts
        yield expert_ids(tokens, top_k, experts, strangers=False), experts
    yield np.full((6, 2), 3, np.int32), 5
    yield np.full((6, 2), -1, np.int32), 5
    yield np.full((6, 2), 5, np.int32), 5


def randoms(dtype: str, *shape: int, seed: int = 0) -> NDArray[Any]:
    """Normal values in ``dtype``."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return np.asarray(values.astype(NUMPY[dtype]))


def router_inputs(attributes: dict[str, Any], dtype: str, tokens: int, experts: int = 8) -> dict[str, Any]:
    """Logits whose order float32 cannot change: other multiples of 1/8, shuffled per token, or all equal."""
    rng = np.random.default_rng([tokens, experts])
    rows = np.stack([rng.permutation(experts) for _ in range(tokens)]) if tokens else np.zeros((0, experts))
    logits = (rows / 8.0 - rng.integers(0, 3, (tokens, 1))) * (1 + rng.integers(0, 2, (tokens, 1)))
    logits[: tokens // 4] = 0.5
    inputs: dict[str, Any] = {"logits": logits.astype(NUMPY[dtype]), "selection_bias": None}
    if attributes.get("biased"):
        inputs["selection_bias"] = (np.round(rng.standard_normal(experts) * 4) / 4).astype(np.float32)
    inputs["sequence_length"] = (
        np.array(max(tokens // 2, 1), np.int64) if attributes.get("capacity") else None
    )
    return inputs


def expert_inputs(
    attributes: dict[str, Any], ids: NDArray[np.int32], experts: int, dtype: str, weight_dtype: str
) -> dict[str, Any]:
    """Inputs of ExpertMLP, H = 6, I = 4."""
    hidden, inner = 6, 4
    wide = inner * (1 + attributes.get("gated", 1))
    transposed = attributes.get("transposed", 0)
    up = (experts, hidden, wide) if transposed else (experts, wide, hidden)
    down = (experts, inner, hidden) if transposed else (experts, hidden, inner)
    biased = attributes.get("biased", 0)
    up_weight = randoms(weight_dtype, *up, seed=1)
    down_weight = (randoms("float32", *down, seed=2) * 0.3).astype(NUMPY[weight_dtype])
    if attributes.get("packed"):
        up_weight = pack_up(up_weight, gated=bool(attributes.get("gated", 1)))
        down_weight = pack_down(down_weight)
    return {
        "hidden": randoms(dtype, len(ids), hidden),
        "expert_ids": ids,
        "weights": np.abs(randoms("float32", *ids.shape)) * 0.3,
        "up": up_weight,
        "down": down_weight,
        "up_bias": randoms(weight_dtype, experts, wide, seed=3) if biased else None,
        "down_bias": randoms(weight_dtype, experts, hidden, seed=4) if biased else None,
    }


def quantized_inputs(
    attributes: dict[str, Any],
    ids: NDArray[np.int32],
    experts: int,
    dtype: str,
    *,
    hidden: int = 1,
    inner: int = 1,
) -> dict[str, Any]:
    """Inputs of QuantizedExpertMLP; ``hidden`` and ``inner`` in blocks. Biases have ``dtype``."""
    block, bits, gated = (attributes.get(k, d) for k, d in (("block", 32), ("bits", 8), ("gated", 1)))
    width, depth = hidden * block, inner * block
    wide = depth * (1 + gated)
    scale = width**-0.5
    up = quantize(randoms("float32", experts, wide, width, seed=1) * scale, bits, block)
    down = quantize(randoms("float32", experts, width, depth, seed=2) * depth**-0.5, bits, block)
    packed_up, packed_down = pack_quantized_up(up, gated=bool(gated)), pack_quantized_down(down)
    biased = attributes.get("biased", 0)
    return {
        "hidden": randoms(dtype, len(ids), width),
        "expert_ids": ids,
        "weights": np.abs(randoms("float32", *ids.shape)) * 0.3,
        "up_codes": packed_up.codes,
        "up_scales": packed_up.scales,
        "down_codes": packed_down.codes,
        "down_scales": packed_down.scales,
        "up_bias": randoms(dtype, experts, wide, seed=3) if biased else None,
        "down_bias": randoms(dtype, experts, width, seed=4) if biased else None,
    }


def rank_slots() -> Iterator[tuple[NDArray[np.int32], int, int]]:
    """Slots [T, K], ranks and slots per rank: spread, no token, one token, all on one rank, none at all."""
    sizes = ((0, 2, 2, 3), (1, 1, 1, 1), (7, 2, 4, 2), (9, 4, 2, 4), (12, 3, 5, 3), (5, 1, 3, 1))
    for tokens, top_k, ranks, per_rank in sizes:
        rng = np.random.default_rng([tokens, top_k, ranks, per_rank])
        yield rng.integers(-1, ranks * per_rank, (tokens, top_k)).astype(np.int32), ranks, per_rank
    yield np.full((6, 2), 3, np.int32), 4, 2
    yield np.full((6, 2), -1, np.int32), 4, 2


def slot_tables() -> Iterator[dict[str, Any]]:
    """Inputs of ExpertSlots: dropped ids, experts that lie nowhere, one to three replica choices."""
    for tokens, top_k, experts, choices in ((0, 2, 4, 1), (1, 1, 1, 1), (7, 2, 4, 3), (5, 4, 6, 2)):
        rng = np.random.default_rng([tokens, top_k, experts])
        yield {
            "expert_ids": rng.integers(-2, experts, (tokens, top_k)).astype(np.int32),
            "table": rng.integers(-1, 9, (experts, choices)).astype(np.int32),
        }


def rank_dispatch_inputs(slots: NDArray[np.int32], capacity: int, dtype: str) -> dict[str, Any]:
    """Inputs of RankDispatch, H = 6."""
    return {
        "hidden": randoms(dtype, len(slots), 6),
        "slots": slots,
        "weights": randoms("float32", *slots.shape, seed=3),
        "capacity": np.array([capacity], np.int64),
    }
