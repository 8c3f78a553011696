"""Plugin nodes through the very GPU kernels that the plugin launches, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import EnvironmentLacksError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_ROWS = 32
"""Of a tile: few large blocks are what the interpreter is quickest with."""


def run_plugin(op: str, inputs: Sequence[Array | None], attributes: Mapping[str, Any]) -> list[Array]:
    """One node as the GPU plugin runs it: for ExpertMLP dispatch, gate_up, down and combine.

    Raises:
        UsageError: no kernels for this op, or outside their limits.
        InputError: inputs that do not fit the attributes.
        EnvironmentLacksError: the kernels or Triton are not installed.
        CheckFailed: a kernel fails.
    """
    try:
        from moe_export_plugins.gpu.chain import run_experts
        from moe_export_plugins.gpu.experts import ExpertShape, tile_sets
    except ModuleNotFoundError as error:
        if error.name not in ("moe_export_plugins", "moe_export_plugins.gpu"):
            raise
        raise EnvironmentLacksError(
            "plugin nodes are simulated by the kernels of the package moe_export_plugins.gpu, which is "
            "missing; install moe-export again"
        ) from None
    from ..ops import OPS

    if op != "ExpertMLP":
        raise UsageError(f"no GPU kernels simulate plugin node {op}; they do ExpertMLP")
    contract = OPS[op]
    given = {p.name: array for p, array in zip(contract.inputs, inputs, strict=False) if array is not None}
    own = {a.name for a in contract.attributes}
    shape = ExpertShape.of(
        {name: value for name, value in attributes.items() if name in own},
        dtype=given["hidden"].dtype.name,
        top_k=given["expert_ids"].shape[1],
        hidden=given["hidden"].shape[1],
        inner=given["down"].shape[1 if attributes.get("transposed") else 2],
        bias_dtype=given["up_bias"].dtype.name if "up_bias" in given else None,
    )
    chosen = next(s for s in tile_sets(shape.dtype) if s.dispatch.rows == _ROWS)
    out: Array = run_experts(shape, given, chosen)["out"]
    return [out]
