"""router: scores, group limit, the K best experts of each token and their weights. One row of threads per
token; nothing is shared between tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import order_key, score


@triton.jit
def _best(key: tl.tensor, column: tl.tensor, NONE: tl.constexpr) -> tl.tensor:
    """First column [B] of the greatest key [B, N] of each row."""
    greatest = tl.max(key, axis=1)
    return tl.min(tl.where(key == greatest[:, None], column[None, :], NONE), axis=1)


@triton.jit
def _keep_groups(
    selection: tl.tensor,
    expert: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    N_GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2: tl.constexpr,
) -> tl.tensor:
    """[B, E] of bool: whether the expert's group is among the best TOPK_GROUP of the token."""
    size: tl.constexpr = E // N_GROUP
    group = tl.arange(0, GROUP_PAD)
    values = tl.full([ROWS, GROUP_PAD], float("-inf"), tl.float32)
    for g in range(N_GROUP):
        inside = ((expert // size == g) & (expert < E))[None, :]
        members = tl.where(inside, selection, float("-inf"))
        value = tl.max(members, axis=1)
        if TOP2 and size > 1:
            first = tl.min(tl.where(inside & (members == value[:, None]), expert[None, :], E), axis=1)
            others = tl.where(expert[None, :] == first[:, None], float("-inf"), members)
            value += tl.max(others, axis=1)
        values = tl.where(group[None, :] == g, value[:, None], values)
    # The least key is that of groups taken and of padding.
    key = tl.where((group < N_GROUP)[None, :], order_key(values), -2147483648)
    keep = tl.zeros([ROWS, expert.shape[0]], tl.int32)
    for _ in range(TOPK_GROUP):
        chosen = _best(key, group, GROUP_PAD)
        keep = tl.where((expert // size)[None, :] == chosen[:, None], 1, keep)
        key = tl.where(group[None, :] == chosen[:, None], -2147483648, key)
    return keep != 0


@triton.jit
def router(
    logits: tl.tensor,
    selection_bias: tl.tensor,
    T: tl.tensor,
    weights: tl.tensor,
    expert_ids: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    SCALE: tl.constexpr,
    N_GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2: tl.constexpr,
    ZERO_MASK: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, E_PAD)
    choice = tl.arange(0, K_PAD)
    real = (expert < E)[None, :]
    x = tl.load(
        logits + token[:, None].to(tl.int64) * E + expert[None, :],
        mask=(token < T)[:, None] & real,
        other=0.0,
    ).to(tl.float32)
    x = tl.where(real, x, float("-inf"))
    scores = score(x, SCORE)
    if BIASED or N_GROUP > 1:
        selection = scores
        if BIASED:
            selection += tl.load(selection_bias + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
        if N_GROUP > 1:
            keep = _keep_groups(selection, expert, E, ROWS, N_GROUP, GROUP_PAD, TOPK_GROUP, TOP2)
            selection = tl.where(keep, selection, 0.0 if ZERO_MASK else float("-inf"))
    else:
        # Every score function grows with the logit, so logits order the experts without its rounding.
        selection = x
    key = tl.where(real, order_key(selection), -2147483648)
    chosen_scores = tl.full([ROWS, K_PAD], float("-inf"), tl.float32)
    ids = tl.zeros([ROWS, K_PAD], tl.int32)
    for k in range(K):
        best = _best(key, expert, E_PAD)
        hit = expert[None, :] == best[:, None]
        value = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        now = (choice == k)[None, :]
        chosen_scores = tl.where(now, value[:, None], chosen_scores)
        ids = tl.where(now, best[:, None], ids)
        key = tl.where(hit, -2147483648, key)
    if SCORE == "softmax_after_topk":
        chosen_scores = score(chosen_scores, "softmax")
    chosen = (choice < K)[None, :]
    result = tl.where(chosen, chosen_scores, 0.0)
    if RENORMALIZE:
        result = result / (tl.sum(result, axis=1)[:, None] + EPSILON)
    result = result * SCALE
    place = token[:, None].to(tl.int64) * K + choice[None, :]
    mask = (token < T)[:, None] & chosen
    tl.store(weights + place, result, mask=mask)
    tl.store(expert_ids + place, ids, mask=mask)
