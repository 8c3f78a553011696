"""A whole MoE layer by the five kernels under the interpreter, numpy in and out. Not run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from moe_export.costs.tiles import KERNELS, Tile, tiles
from moe_export.errors import UsageError

from .contract import CONTRACTS
from .interpret import run_interpreted


@dataclass(frozen=True)
class LayerResult:
    """``weights`` float32 and ``expert_ids`` int32 [T, K], ``out`` [T, H], ``counts`` int32 [E+1]."""

    weights: NDArray[Any]
    expert_ids: NDArray[Any]
    out: NDArray[Any]
    counts: NDArray[Any]


def smallest_tiles(dtype: str) -> dict[str, Tile]:
    """The first tile of each kernel's list; their rows agree."""
    return {kernel: tiles(kernel, dtype)[0] for kernel in KERNELS}


def run_layer(
    logits: NDArray[Any],
    hidden: NDArray[Any],
    up: NDArray[Any],
    down: NDArray[Any],
    constants: Mapping[str, Any],
    *,
    selection_bias: NDArray[Any] | None = None,
    up_bias: NDArray[Any] | None = None,
    down_bias: NDArray[Any] | None = None,
    chosen: Mapping[str, Tile] | None = None,
) -> LayerResult:
    """Router, dispatch, gate_up, down and combine, one after the other.

    ``logits`` [T, E], ``hidden`` [T, H]; ``up``, ``down`` and biases as the contracts say. ``constants``:
    attributes of the ops Router and ExpertMLP by name; sizes and dtypes are read off the arrays.

    Raises:
        UsageError: constants outside the kernels' limits.
        InputError: arrays that do not fit each other.
    """
    transposed = int(constants.get("transposed", 0))
    inner = down.shape[1 if transposed else 2]
    sizes = {"num_experts": up.shape[0], "hidden": hidden.shape[1], "inner": inner}
    tile = dict(chosen or smallest_tiles(hidden.dtype.name))
    known = {a.name for c in CONTRACTS.values() for a in c.constants}
    if unknown := set(constants) - known - {"capacity"}:
        raise UsageError(f"GPU kernels of a layer: unknown constants {', '.join(sorted(unknown))}")

    def run(kernel: str, arrays: Mapping[str, NDArray[Any] | None], bias: NDArray[Any] | None = None) -> Any:
        given = {**constants, **sizes, "biased": int(bias is not None)}
        if bias is not None:
            given["bias_dtype"] = bias.dtype.name
        kept = {a.name: given[a.name] for a in CONTRACTS[kernel].constants if a.name in given}
        present = {name: array for name, array in arrays.items() if array is not None}
        return run_interpreted(kernel, present, kept, tile[kernel], dtype=str(hidden.dtype.name))

    routed = run_interpreted_router(logits, selection_bias, constants, tile["router"])
    ids, weights = routed["expert_ids"], routed["weights"]
    blocks = run("dispatch", {"expert_ids": ids})
    places = {name: blocks[name] for name in ("sorted_rows", "block_expert")}
    activations = run("gate_up", {"hidden": hidden, "up": up, "up_bias": up_bias, **places}, up_bias)
    rows = run(
        "down",
        {"inner": activations["inner"], "down": down, "down_bias": down_bias, "weights": weights, **places},
        down_bias,
    )
    out = run("combine", {"rows": rows["rows"], "expert_ids": ids})
    return LayerResult(weights, ids, out["out"], blocks["counts"])


def run_interpreted_router(
    logits: NDArray[Any],
    selection_bias: NDArray[Any] | None,
    constants: Mapping[str, Any],
    tile: Tile,
) -> dict[str, NDArray[Any]]:
    """The router kernel alone; ``constants`` may hold those of other kernels too."""
    names = {a.name for a in CONTRACTS["router"].constants} | {"capacity"}
    given = {k: v for k, v in constants.items() if k in names}
    given |= {"num_experts": logits.shape[1], "biased": int(selection_bias is not None)}
    arrays = {"logits": logits}
    if selection_bias is not None:
        arrays["selection_bias"] = selection_bias
        given["bias_dtype"] = selection_bias.dtype.name
    return run_interpreted("router", arrays, given, tile)
