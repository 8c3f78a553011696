"""A whole MoE layer by the five kernels under the interpreter, numpy in and out. Not run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from moe_export.costs.tiles import Tile, tiles
from moe_export.errors import UsageError
from moe_export.ops import OPS

from .contract import CONTRACTS
from .experts import STEPS, ExpertShape, TileSet, tile_sets
from .interpret import run_interpreted


@dataclass(frozen=True)
class LayerResult:
    """``weights`` float32 and ``expert_ids`` int32 [T, K], ``out`` [T, H], ``counts`` int32 [E+1]."""

    weights: NDArray[Any]
    expert_ids: NDArray[Any]
    out: NDArray[Any]
    counts: NDArray[Any]


def run_experts(
    shape: ExpertShape, inputs: Mapping[str, NDArray[Any]], chosen: TileSet | None = None
) -> dict[str, NDArray[Any]]:
    """One ExpertMLP node: dispatch, gate_up, down and combine, one after the other.

    ``inputs``: those of the op, by name. Returns them and every kernel's outputs, by name.

    Raises:
        InputError: an input is missing or too many, or does not fit the shape.
    """
    tensors = dict(inputs)
    tile = chosen or tile_sets(shape.dtype)[0]
    for name in STEPS:
        rules, constants = CONTRACTS[name], shape.constants(name)
        # A bias that the shape does not have is passed on, to be refused.
        given = {t.name: tensors[t.name] for t in rules.inputs if t.name in tensors}
        tensors |= run_interpreted(name, given, constants, tile.of(name), dtype=shape.dtype)
    return tensors


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
    attributes of the ops Router and ExpertMLP by name; sizes and dtypes are read off the arrays. ``chosen``:
    a tile for each of the five kernels.

    Raises:
        UsageError: constants outside the kernels' limits.
        InputError: arrays that do not fit each other.
    """
    ops = {name: {a.name for a in OPS[name].attributes} for name in ("Router", "ExpertMLP")}
    if unknown := set(constants) - ops["Router"] - ops["ExpertMLP"]:
        raise UsageError(f"GPU kernels of a layer: unknown constants {', '.join(sorted(unknown))}")
    biases = {n: b for n, b in (("up_bias", up_bias), ("down_bias", down_bias)) if b is not None}
    shape = ExpertShape.of(
        {
            **{k: v for k, v in constants.items() if k in ops["ExpertMLP"]},
            "num_experts": up.shape[0],
            "biased": int(bool(biases)),
        },
        dtype=hidden.dtype.name,
        top_k=constants["top_k"],
        hidden=hidden.shape[1],
        inner=down.shape[1 if constants.get("transposed") else 2],
        bias_dtype=next((b.dtype.name for b in biases.values()), None),
    )
    router_tile = chosen["router"] if chosen else tiles("router", shape.dtype)[0]
    routed = run_interpreted_router(logits, selection_bias, constants, router_tile)
    made = run_experts(
        shape,
        {"hidden": hidden, "up": up, "down": down, **biases, **routed},
        TileSet(**{name: chosen[name] for name in STEPS}) if chosen else None,
    )
    return LayerResult(made["weights"], made["expert_ids"], made["out"], made["counts"])


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
