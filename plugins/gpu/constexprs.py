"""From the constants of a contract and a tile to the compile-time arguments of its Triton kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_export.costs.tiles import Tile


def _power(number: int, least: int = 1) -> int:
    return max(least, 1 << (number - 1).bit_length())


def precision(dtype: str) -> str:
    """How tensor cores multiply: float32 as three TF32 products of split numbers, which keeps 21 bits or more
    of each factor; 16-bit numbers as they are."""
    return "tf32x3" if dtype == "float32" else "ieee"


def constexprs(kernel: str, constants: Mapping[str, Any], dtype: str, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of ``kernels/<kernel>.py``; constants as ``KernelContract.complete`` gives."""
    c = constants
    if kernel == "router":
        return {
            "E": c["num_experts"],
            "E_PAD": _power(c["num_experts"], 2),
            "K": c["top_k"],
            "K_PAD": _power(c["top_k"], 2),
            "SCORE": c["score"],
            "RENORMALIZE": c["renormalize"],
            "EPSILON": c["epsilon"],
            "SCALE": c["scale"],
            "N_GROUP": c["n_group"],
            "GROUP_PAD": _power(c["n_group"], 2),
            "TOPK_GROUP": c["topk_group"],
            "TOP2": int(c["group_score"] == "top2_sum"),
            "ZERO_MASK": int(c["group_mask"] == "zero"),
            "BIASED": c["biased"],
            "ROWS": tile.rows,
        }
    if kernel == "dispatch":
        return {
            "E": c["num_experts"],
            "E_PAD": _power(c["num_experts"], 2),
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
        }
    if kernel == "combine":
        return {
            "E": c["num_experts"],
            "K": c["top_k"],
            "H": c["hidden"],
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
        }
    product = {
        "H": c["hidden"],
        "INNER": c["inner"],
        "TRANSPOSED": c["transposed"],
        "BIASED": c["biased"],
        "PRECISION": precision(dtype),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
    }
    if kernel == "down":
        return product
    return product | {
        "K": c["top_k"],
        "ACTIVATION": c["activation"],
        "GATED": c["gated"],
        "INTERLEAVED": int(c["layout"] == "interleaved"),
        "ALPHA": c["alpha"],
        "LIMIT": c["limit"],
    }
