"""Inputs, references and error measures for tests of the GPU kernels."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from moe_export.ops import expert_mlp
from moe_export.ops import router as router_op

LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 6e-3}
"""Largest error over max |reference|. Written again, so that a test sees the kernels' own limits change."""

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def normal(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> NDArray[Any]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(DTYPES[dtype])


def error(result: NDArray[Any], reference: NDArray[np.float64]) -> float:
    """Largest difference over max |reference|; infinite where something is not a number or shapes differ."""
    if result.shape != reference.shape:
        return float("inf")
    if not result.size:
        return 0.0
    difference = np.abs(result.astype(np.float64) - reference).max()
    return float(difference / np.abs(reference).max()) if np.isfinite(difference) else float("inf")


def different_ids(
    ids: NDArray[np.int32],
    logits: NDArray[Any],
    selection_bias: NDArray[Any] | None,
    attributes: dict[str, Any],
    closeness: float = 1e-6,
) -> list[tuple[int, int]]:
    """Places (t, k) where ``ids`` differ from the reference's although no tie explains it.

    A tie is proven by the reference: its own selection values of the two experts differ by less than
    ``closeness`` of the largest.
    """
    names = {a.name for a in router_op.ROUTER.attributes}
    given = {k: v for k, v in attributes.items() if k in names}
    _, wanted = router_op.reference(logits, selection_bias, **given)
    _, selection = router_op.scores_and_selection(logits, selection_bias, **router_op.ROUTER.complete(given))
    found = []
    for t, k in zip(*np.nonzero(ids != wanted), strict=True):
        finite = np.abs(selection[t][np.isfinite(selection[t])])
        limit = closeness * max(float(finite.max(initial=0.0)), 1e-300)
        a, b = selection[t, ids[t, k]], selection[t, wanted[t, k]]
        if len(set(ids[t])) < len(ids[t]) or not (a == b or abs(a - b) <= limit):
            found.append((int(t), int(k)))
    return found


class Layer:
    """A MoE layer with random weights, in the kernels' dtype, and its float64 reference."""

    def __init__(
        self,
        dtype: str,
        *,
        tokens: int,
        experts: int,
        top_k: int,
        hidden: int,
        inner: int,
        biased: bool = False,
        seed: int = 0,
        router: dict[str, Any] | None = None,
        selection_bias: bool = False,
        **mlp: Any,
    ) -> None:
        gated = int(mlp.get("gated", 1))
        wide = (1 + gated) * inner
        self.dtype = dtype
        self.attributes = {"top_k": top_k, **(router or {}), **mlp}
        self.logits = normal(seed, (tokens, experts), dtype)
        self.hidden = normal(seed + 1, (tokens, hidden), dtype)
        up = normal(seed + 2, (experts, wide, hidden), dtype, hidden**-0.5)
        down = normal(seed + 3, (experts, hidden, inner), dtype, inner**-0.5)
        if mlp.get("transposed"):
            up, down = (np.ascontiguousarray(np.swapaxes(m, 1, 2)) for m in (up, down))
        self.up, self.down = up, down
        self.up_bias = normal(seed + 4, (experts, wide), dtype, 0.1) if biased else None
        self.down_bias = normal(seed + 5, (experts, hidden), dtype, 0.1) if biased else None
        self.selection_bias = normal(seed + 6, (experts,), "float32", 0.1) if selection_bias else None
        self.mlp = mlp

    def reference(self, weights: NDArray[Any], ids: NDArray[np.int32]) -> NDArray[np.float64]:
        """Experts and combination in float64 for given routing."""
        return expert_mlp.reference(
            self.hidden, ids, weights, self.up, self.down, self.up_bias, self.down_bias,
            num_experts=self.up.shape[0], **self.mlp,
        )  # fmt: skip

    def routing(self) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        names = {a.name for a in router_op.ROUTER.attributes}
        given = {k: v for k, v in self.attributes.items() if k in names}
        return router_op.reference(self.logits, self.selection_bias, **given)
