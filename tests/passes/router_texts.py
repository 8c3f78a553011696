"""Routers as ONNX text, and what the tests of recognising them share."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_export.passes.attach_router import AttachRouter

from .moe_graphs import (
    EXPERTS,
    one_layer,
    run,
    tokens,
)

BIAS = np.random.default_rng(3).standard_normal(EXPERTS).astype(np.float32)
PLAIN = "scores = Softmax <axis = -1> (logits)\n best, chosen = TopK <axis = -1> (scores, k)\n"


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def attach(router: str, more: dict[str, Any] | None = None, **layer: Any) -> tuple[Any, Any]:
    context = one_layer(router, more=more, **layer)
    before = context.model.clone()
    AttachRouter().apply(context)
    return context, before


def same_results(context: Any, before: Any) -> None:
    """The model computes what it did, at several sizes."""
    for count, scale in ((0, 1.0), (1, 1.0), (33, 1.0), (20, 30.0)):
        hidden = tokens(count, scale=scale)
        (old,), (new,) = run(before, hidden), run(context.model, hidden)
        assert old.shape == new.shape
        assert np.abs(new - old).max(initial=0) <= 1e-5 * max(1.0, np.abs(old).max(initial=0))


def routing(context: Any, hidden: Any) -> tuple[Any, Any]:
    ids, weights = run(context.model, hidden, ("moe.0.expert_ids", "moe.0.weights"))
    order = np.argsort(ids, axis=-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)


def renamed(text: str) -> str:
    """The text of a second layer with names of its own."""
    import re

    locals_ = set(re.findall(r"^\s*([\w, ]+?) =", text, re.MULTILINE))
    names = {n.strip() for group in locals_ for n in group.split(",")} - {"out_1"}
    return re.sub(r"\b(\w+)\b", lambda m: f"{m[1]}_b" if m[1] in names else m[1], text)
