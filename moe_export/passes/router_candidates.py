"""Which Router op a router's plain nodes may be: where its logits are, and the parameters worth proving."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..graph.subgraph import ancestors
from ..ops import DOMAIN
from .router_proof import by_expert

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


def logit_candidates(
    model: ir.Model, ids: ir.Value, weights: ir.Value, num_experts: int
) -> Iterator[ir.Value]:
    """Float values [.., E] that everything between them and the routing depends on, farthest first.

    Not searched beyond the output of another MoE layer.
    """
    others = [n.outputs[0] for n in model.graph if n.domain == DOMAIN and n.op_type == "Combine"]
    nodes, _ = ancestors([ids, weights], others)
    matmuls = [
        node.outputs[0]
        for node in nodes
        if node.op_type in ("MatMul", "Gemm") and _last_dim(node.outputs[0]) == num_experts
    ]
    for start in matmuls:
        value = start
        for _ in range(6):
            inner, reached = ancestors([ids, weights], [value])
            if reached and _is_float(value):
                yield value
            users = [n for n, _ in value.uses() if any(n is m for m in inner)]
            following = {id(n): n for n in users}
            if len(following) != 1:
                break
            node = next(iter(following.values()))
            if len(node.outputs) != 1 or _last_dim(node.outputs[0]) != num_experts:
                break
            value = node.outputs[0]


def _last_dim(value: ir.Value) -> int | None:
    if value.shape is None or len(value.shape) < 2:
        return None
    last = value.shape[-1]
    return last if isinstance(last, int) else None


def _is_float(value: ir.Value) -> bool:
    import onnx_ir as ir

    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def expert_vectors(nodes: Sequence[ir.Node], num_experts: int) -> list[ir.Value]:
    """Constants of one number per expert among the inputs of ``nodes``."""
    found: dict[int, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None or not value.is_initializer() or value.const_value is None:
                continue
            shape = tuple(value.const_value.shape)
            if shape and shape[-1] == num_experts and value.const_value.size == num_experts:
                found[id(value)] = value
    return list(found.values())


def parameters(
    top_k: int, num_experts: int, nodes: Sequence[ir.Node], numbers: Sequence[float], has_bias: bool
) -> Iterator[dict[str, Any]]:
    """Attributes of the Router op (without scale) that the nodes may stand for, simple ones first."""
    epsilons = sorted({0.0} | {n for n in numbers if 0 < n < 1e-3}, reverse=True)
    groupings: list[dict[str, Any]] = [{}]
    if sum(1 for n in nodes if n.op_type == "TopK") > 1:
        groupings += _groupings(top_k, num_experts, numbers)
    for grouping in groupings:
        for score in ("softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"):
            for biased in (1, 0) if has_bias else (0,):
                for renormalize in (0, 1) if score != "softmax_after_topk" else (0,):
                    for epsilon in epsilons if renormalize else (0.0,):
                        yield {
                            "top_k": top_k,
                            "score": score,
                            "renormalize": renormalize,
                            "epsilon": epsilon,
                            "biased": biased,
                            **grouping,
                        }


def _groupings(top_k: int, num_experts: int, numbers: Sequence[float]) -> Iterator[dict[str, Any]]:
    sizes = [g for g in range(2, num_experts) if num_experts % g == 0]
    counts = {int(n) for n in numbers if 1 <= n <= num_experts and n == int(n)}
    for n_group, score, mask in itertools.product(sizes, ("max", "top2_sum"), ("minus_infinity", "zero")):
        for topk_group in range(1, n_group + 1):
            if counts and topk_group not in counts:
                continue
            if topk_group * (num_experts // n_group) < top_k:
                continue
            yield {"n_group": n_group, "topk_group": topk_group, "group_score": score, "group_mask": mask}


def fit_scale(
    wanted: tuple[NDArray[Any], NDArray[Any]],
    found: tuple[NDArray[Any], NDArray[Any]],
    numbers: Sequence[float],
    tolerance: float,
) -> float | None:
    """The factor from one routing's weights to another's, among the graph's own numbers; None if the experts
    differ or there is none."""
    import numpy as np

    (a_ids, a), (b_ids, b) = by_expert(*wanted), by_expert(*found)
    if a_ids.shape != b_ids.shape or not np.array_equal(a_ids, b_ids):
        return None
    for scale in [1.0, *numbers]:
        if np.allclose(a, b * scale, rtol=max(tolerance * 10, 1e-5), atol=max(tolerance, 1e-6)):
            return float(scale)
    return None
