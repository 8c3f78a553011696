"""ONNX Runtime's fusions change the nodes and not the numbers, small constants included."""

from __future__ import annotations

import numpy as np

from moe_export.graph.onnxscript_rewrites import exact_rewrites
from moe_export.passes.library_fusions import LibraryFusions

from .moe_graphs import SOFTMAX_RENORMALISED, context_of, layer_text, layer_weights, model_of, run, tokens


def test_small_constants_stay() -> None:
    text = (
        layer_text(SOFTMAX_RENORMALISED)
        + """
    nothing = Mul (out_0, zero)
    little = Add (nothing, tiny)
    tall = Log (little)
    wide = Mul (tall, nearly_one)
    same = Add (wide, zero)
    """
    )
    constants = {
        "zero": np.array(0, np.float32),
        "tiny": np.array(1e-9, np.float32),
        "nearly_one": np.array(1.000005, np.float32),
    }
    context = context_of(model_of(text, {**layer_weights(), **constants}, result="same"))
    before = context.model.clone()
    LibraryFusions().apply(context)
    hidden = tokens(4)
    (got,), (want,) = run(context.model, hidden), run(before, hidden)
    assert np.array_equal(got, want)
    assert np.allclose(got, np.log(np.float32(1e-9)) * np.float32(1.000005), rtol=1e-7)
    assert context.decisions[0].subject == "attention and norms"
    names = ("moe.0.hidden", "moe.0.expert_ids", "moe.0.weights", "moe.0.output")
    for old, new in zip(run(before, hidden, names), run(context.model, hidden, names), strict=True):
        assert np.allclose(old, new, atol=1e-6)


def test_the_rules_are_restored() -> None:
    from onnxscript.rewriter import _matcher

    before = _matcher.math
    with exact_rewrites():
        assert _matcher.math is not before
        assert not _matcher.math.isclose(1e-9, 0.0, rel_tol=1e-5, abs_tol=1e-8)
        assert not _matcher.math.isclose(1.000004, 1.0, rel_tol=1e-5, abs_tol=1e-8)
        assert _matcher.math.isclose(float(np.float32(0.044715)), 0.044715, rel_tol=1e-5, abs_tol=1e-8)
    assert _matcher.math is before
