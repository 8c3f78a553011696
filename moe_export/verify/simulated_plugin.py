"""Plugin nodes through the very GPU kernels that the plugin launches, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..costs.tiles import tiles
from ..errors import EnvironmentLacksError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..costs.tiles import Tile

    Array = NDArray[Any]

_ROWS = 32
"""Of a tile: few large blocks are what the interpreter is quickest with."""
_OWN = ("num_experts", "activation", "gated", "layout", "transposed", "alpha", "limit")


def _tile(kernel: str, dtype: str) -> Tile:
    known = tiles(kernel, dtype)
    return next((t for t in known if t.rows == _ROWS), known[-1])


def run_plugin(op: str, inputs: Sequence[Array | None], attributes: Mapping[str, Any]) -> list[Array]:
    """One node as the GPU plugin runs it: for ExpertMLP dispatch, gate_up, down and combine.

    Raises:
        UsageError: no kernels for this op, or outside their limits.
        EnvironmentLacksError: the kernels or Triton are not installed.
        CheckFailed: a kernel fails.
    """
    try:
        from moe_export_plugins.gpu.contract import CONTRACTS
        from moe_export_plugins.gpu.interpret import run_interpreted
    except ImportError as error:
        raise EnvironmentLacksError(
            f"plugin nodes are simulated by the GPU kernels, which cannot be imported ({error}); "
            "pip install 'moe-export[gpu]'"
        ) from error
    if op != "ExpertMLP":
        raise UsageError(f"no GPU kernels simulate plugin node {op}; they do ExpertMLP")
    hidden, ids, weights, up, down, *biases = inputs
    assert hidden is not None and ids is not None and up is not None and down is not None
    up_bias, down_bias = biases if biases else (None, None)
    given = {name: attributes[name] for name in _OWN if name in attributes}
    given |= {
        "top_k": ids.shape[1],
        "hidden": hidden.shape[1],
        "inner": down.shape[1 if attributes.get("transposed") else 2],
    }
    chosen = {
        kernel: _tile(kernel, hidden.dtype.name) for kernel in ("dispatch", "gate_up", "down", "combine")
    }

    def run(kernel: str, arrays: Mapping[str, Array | None], bias: Array | None = None) -> dict[str, Array]:
        constants = {**given, "biased": int(bias is not None)}
        if bias is not None:
            constants["bias_dtype"] = bias.dtype.name
        kept = {a.name: constants[a.name] for a in CONTRACTS[kernel].constants if a.name in constants}
        present = {name: array for name, array in arrays.items() if array is not None}
        done: dict[str, Array] = run_interpreted(
            kernel, present, kept, chosen[kernel], dtype=hidden.dtype.name
        )
        return done

    blocks = run("dispatch", {"expert_ids": ids})
    places = {name: blocks[name] for name in ("sorted_rows", "block_expert")}
    inner = run("gate_up", {"hidden": hidden, "up": up, "up_bias": up_bias, **places}, up_bias)
    rows = run(
        "down",
        {"inner": inner["inner"], "down": down, "down_bias": down_bias, "weights": weights, **places},
        down_bias,
    )
    return [run("combine", {"rows": rows["rows"], "expert_ids": ids})["out"]]
