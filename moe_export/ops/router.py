"""Router: from router logits to each token's experts and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .contract import FLOAT_TYPES, Attribute, OpContract, Param, Tolerance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk")
GROUP_SCORES = ("max", "top2_sum")
GROUP_MASKS = ("minus_infinity", "zero")


def scores_and_selection(
    logits: NDArray[Any],
    selection_bias: NDArray[Any] | None = None,
    *,
    score: str,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    group_mask: str = "minus_infinity",
    **_other: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The score of each expert and the value it is selected by (bias added, other groups masked), float64
    [T, E]."""
    import numpy as np

    x = np.asarray(logits, np.float64)
    if score == "softmax":
        shifted = np.exp(x - x.max(axis=-1, keepdims=True)) if x.size else x
        scores = shifted / shifted.sum(axis=-1, keepdims=True)
    elif score == "sigmoid":
        scores = 1.0 / (1.0 + np.exp(-np.clip(x, -700, 700)))
    elif score == "sqrtsoftplus":
        scores = np.sqrt(np.logaddexp(0.0, x))
    else:
        scores = x
    selection = scores if selection_bias is None else scores + np.asarray(selection_bias, np.float64)
    if n_group > 1:
        grouped = selection.reshape(x.shape[0], n_group, x.shape[1] // n_group)
        if group_score == "max":
            group_value = grouped.max(axis=-1)
        else:
            group_value = np.sort(grouped, axis=-1)[:, :, -2:].sum(axis=-1)
        chosen = np.argsort(-group_value, axis=-1, kind="stable")[:, :topk_group]
        keep = np.zeros(group_value.shape, bool)
        np.put_along_axis(keep, chosen, True, axis=-1)
        fill = -np.inf if group_mask == "minus_infinity" else 0.0
        selection = np.where(np.repeat(keep, grouped.shape[2], axis=-1), selection, fill)
    return scores, selection


def reference(
    logits: NDArray[Any],
    selection_bias: NDArray[Any] | None = None,
    sequence_length: int | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    renormalize: int = 0,
    epsilon: float = 0.0,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    group_mask: str = "minus_infinity",
    capacity: int = 0,
    biased: int = 0,
    layer: str = "",
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Weights float64 [T, K] and expert ids int32 [T, K], experts in order of falling selection value.

    Equal values: the lower expert id wins. ``capacity`` > 0: in each run of ``sequence_length`` tokens an
    expert takes its first ``capacity`` assignments (in token order, then k); later ones get id -1 and weight
    0 (Switch Transformers, Fedus et al. 2021). Sources: Shazeer et al. 2017 (softmax over the top k), Mixtral
    (softmax, renormalised), DeepSeek-V2/V3 (groups, sigmoid, selection bias, scale).
    """
    import numpy as np

    scores, selection = scores_and_selection(
        logits,
        selection_bias,
        score=score,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
        group_mask=group_mask,
    )
    ids_64 = np.argsort(-selection, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids_64, axis=-1)
    if score == "softmax_after_topk" and weights.size:
        exponent = np.exp(weights - weights.max(axis=-1, keepdims=True))
        weights = exponent / exponent.sum(axis=-1, keepdims=True)
    if renormalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + epsilon)
    weights = weights * scale
    ids: NDArray[np.int32] = ids_64.astype(np.int32)
    if capacity:
        run = max(sequence_length or ids.shape[0], 1)
        for begin in range(0, ids.shape[0], run):
            counts: dict[int, int] = {}
            for t in range(begin, min(begin + run, ids.shape[0])):
                for k in range(top_k):
                    expert = int(ids[t, k])
                    counts[expert] = counts.get(expert, 0) + 1
                    if counts[expert] > capacity:
                        ids[t, k], weights[t, k] = -1, 0.0
    return weights, ids


def body(attributes: Mapping[str, Any], _opset: int) -> str:
    score = attributes["score"]
    lines = [
        "x = Cast <to = 1> (logits)",
        "last_1d = Constant <value_ints = [-1]> ()",
        "top_k_1d = Constant <value_int : int = @top_k> ()",
        "top_k_count = Reshape (top_k_1d, last_1d)",
    ]
    lines.append(
        {
            "softmax": "scores = Softmax <axis = -1> (x)",
            "sigmoid": "scores = Sigmoid (x)",
            "sqrtsoftplus": "plus = Softplus (x)\n scores = Sqrt (plus)",
            "softmax_after_topk": "scores = Identity (x)",
        }[score]
    )
    selection = "scores"
    if attributes["biased"]:
        lines.append("bias_f32 = Cast <to = 1> (selection_bias)\n biased_scores = Add (scores, bias_f32)")
        selection = "biased_scores"
    if attributes["n_group"] > 1:
        lines.append(f"""
        n_group_0d = Constant <value_int : int = @n_group> ()
        n_group_1d = Reshape (n_group_0d, last_1d)
        topk_group_0d = Constant <value_int : int = @topk_group> ()
        topk_group_1d = Reshape (topk_group_0d, last_1d)
        full_shape = Shape (x)
        tokens = Shape <start = 0, end = 1> (x)
        experts = Shape <start = 1, end = 2> (x)
        per_group = Div (experts, n_group_1d)
        grouped_shape = Concat <axis = 0> (tokens, n_group_1d, per_group)
        grouped = Reshape <allowzero = 1> ({selection}, grouped_shape)
        """)
        if attributes["group_score"] == "max":
            lines.append("group_reduced = ReduceMax <keepdims = 0> (grouped, last_1d)")
        else:
            lines.append("""two_1d = Constant <value_ints = [2]> ()
            best_two, best_two_ids = TopK <axis = -1, largest = 1, sorted = 1> (grouped, two_1d)
            group_reduced = ReduceSum <keepdims = 0> (best_two, last_1d)""")
        # The Reshape after each reduction is for T = 0: ONNX Runtime then returns the input shape.
        fill = "-inf" if attributes["group_mask"] == "minus_infinity" else "0.0"
        fill_node = (
            "fill_one = Constant <value_float = 1.0> ()\n fill_zero = Constant <value_float = 0.0> ()\n"
            "fill_inf = Div (fill_one, fill_zero)\n fill = Neg (fill_inf)"
            if fill == "-inf"
            else "fill = Constant <value_float = 0.0> ()"
        )
        lines.append(f"""
        group_value_shape = Concat <axis = 0> (tokens, n_group_1d)
        group_value = Reshape <allowzero = 1> (group_reduced, group_value_shape)
        group_best, group_ids = TopK <axis = -1, largest = 1, sorted = 1> (group_value, topk_group_1d)
        group_shape = Shape (group_value)
        group_zeros = ConstantOfShape (group_shape)
        chosen_shape = Shape (group_best)
        chosen_ones = ConstantOfShape <value = float[1] {{1.0}}> (chosen_shape)
        group_keep = ScatterElements <axis = 1> (group_zeros, group_ids, chosen_ones)
        keep_column = Unsqueeze (group_keep, last_1d)
        keep = Cast <to = 9> (keep_column)
        {fill_node}
        limited_groups = Where (keep, grouped, fill)
        limited = Reshape <allowzero = 1> (limited_groups, full_shape)
        """)
        selection = "limited"
    lines.append(f"best, ids_64 = TopK <axis = -1, largest = 1, sorted = 1> ({selection}, top_k_count)")
    if selection == "scores":
        lines.append("picked = Identity (best)")
    else:
        lines.append("picked = GatherElements <axis = 1> (scores, ids_64)")
    if score == "softmax_after_topk":
        lines.append("raw = Softmax <axis = -1> (picked)")
    else:
        lines.append("raw = Identity (picked)")
    if attributes["renormalize"]:
        lines.append("""sum = ReduceSum <keepdims = 1> (raw, last_1d)
        epsilon_value = Constant <value_float : float = @epsilon> ()
        denominator = Add (sum, epsilon_value)
        normal = Div (raw, denominator)""")
    else:
        lines.append("normal = Identity (raw)")
    lines.append(
        "scale_value = Constant <value_float : float = @scale> ()\n scaled = Mul (normal, scale_value)"
    )
    if attributes["capacity"]:
        # Number each assignment among those of its expert within its sequence; beyond the capacity: dropped.
        lines.append("""
        one_1d = Constant <value_ints = [1]> ()
        length_1d = Reshape (sequence_length, last_1d)
        at_least_one = Max (length_1d, one_1d)
        flat_ids = Reshape (ids_64, last_1d)
        run = Mul (at_least_one, top_k_count)
        run_shape = Concat <axis = 0> (last_1d, run)
        by_run = Reshape (flat_ids, run_shape)
        expert_count = Shape <start = 1, end = 2> (x)
        expert_total = Squeeze (expert_count)
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        expert_row = Range (zero, expert_total, one)
        id_column = Unsqueeze (by_run, last_1d)
        hit = Equal (id_column, expert_row)
        hit_64 = Cast <to = 7> (hit)
        axis_tokens = Constant <value_int = 1> ()
        running = CumSum (hit_64, axis_tokens)
        own = Mul (running, hit_64)
        number = ReduceSum <keepdims = 0> (own, last_1d)
        capacity_value = Constant <value_int : int = @capacity> ()
        over_run = Greater (number, capacity_value)
        ids_shape = Shape (ids_64)
        over = Reshape <allowzero = 1> (over_run, ids_shape)
        dropped = Constant <value_int = -1> ()
        ids_kept = Where (over, dropped, ids_64)
        no_weight = Constant <value_float = 0.0> ()
        weights = Where (over, no_weight, scaled)
        expert_ids = Cast <to = 6> (ids_kept)""")
    else:
        lines.append("weights = Identity (scaled)\n expert_ids = Cast <to = 6> (ids_64)")
    return "\n".join(lines)


def _conflict(attributes: Mapping[str, Any]) -> str:
    if attributes["topk_group"] > attributes["n_group"]:
        return f"topk_group {attributes['topk_group']} is more than n_group {attributes['n_group']}"
    return ""


ROUTER = OpContract(
    name="Router",
    summary="Chooses each token's experts from router logits and gives their weights; the lower id wins ties",
    inputs=(
        Param("logits", ("T", "E"), FLOAT_TYPES, "router logits"),
        Param("selection_bias", ("E",), FLOAT_TYPES, "added to the scores for selection only", optional=True),
        Param("sequence_length", (), ("int64",), "tokens per sequence; with capacity only", optional=True),
    ),
    outputs=(
        Param("weights", ("T", "K"), ("float32",), "routing weights"),
        Param("expert_ids", ("T", "K"), ("int32",), "chosen experts, -1 = dropped"),
    ),
    attributes=(
        Attribute("top_k", int, "experts per token K", minimum=1),
        Attribute(
            "score", str, "how logits become scores", default="softmax", choices=SCORES, structural=True
        ),
        Attribute(
            "renormalize",
            int,
            "1: divide by the sum over the chosen",
            default=0,
            choices=(0, 1),
            structural=True,
        ),
        Attribute("epsilon", float, "added to that sum", default=0.0),
        Attribute("scale", float, "factor on the weights", default=1.0),
        Attribute("n_group", int, "groups of experts; 1 = no groups", default=1, structural=True, minimum=1),
        Attribute("topk_group", int, "groups a token may choose from", default=1, minimum=1),
        Attribute(
            "group_score", str, "how a group is valued", default="max", choices=GROUP_SCORES, structural=True
        ),
        Attribute(
            "group_mask",
            str,
            "selection value of experts in other groups",
            default="minus_infinity",
            choices=GROUP_MASKS,
            structural=True,
        ),
        Attribute(
            "capacity",
            int,
            "most assignments per expert and sequence; 0 = no limit",
            default=0,
            structural=True,
            minimum=0,
        ),
        Attribute("biased", int, "1: selection_bias is given", default=0, choices=(0, 1), structural=True),
        Attribute("layer", str, "name of the MoE layer in the source model", default=""),
    ),
    reference=reference,
    body=body,
    tolerance={d: Tolerance(2e-6, 5e-7, "computed in float32 from the given logits") for d in FLOAT_TYPES},
    conflict=_conflict,
    source="Shazeer et al. 2017 (arXiv 1701.06538); Fedus et al. 2021 (2101.03961); DeepSeek-V3 (2412.19437)",
)
