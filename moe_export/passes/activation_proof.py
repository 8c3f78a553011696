"""Which activation an expert's plain nodes are: found by running them beside the op's reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..graph.subgraph import ancestors, extract, session_of
from ..ops.expert_mlp import ACTIVATIONS, LAYOUTS, activate
from .router_proof import constants

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

TOLERANCE = {"float32": 1e-6, "float16": 4e-3}
"""Largest difference relative to max(1, |gate * up|), or max(1, x * x) where not gated: rounding of float32,
and of float16 intermediates. A sigmoid's error is float32's rounding of 1, however small it is, and is
multiplied by both numbers."""

_PLAIN = tuple(name for name in ACTIVATIONS if name != "clamped_swiglu")
_OPERATOR_NAMES = """
Abs Add Cast CastLike Clip Concat Constant Div Erf Exp Gather Gelu Identity Max Min Mul Neg Pow QuickGelu Relu
Reshape Shape Sigmoid Slice Softplus Split Sqrt Squeeze Sub Swish Tanh Transpose Unsqueeze
"""
_OPERATORS = frozenset(_OPERATOR_NAMES.split())
"""What an activation's nodes may be: each number depends on its own row's numbers only."""

Activation = Mapping[str, Any]
"""Attributes ``activation``, ``gated``, ``layout``, ``alpha``, ``limit`` of ExpertMLP."""


def find_activation(
    model: ir.Model, inner: ir.Value, rows: ir.Value, width: int, intermediate: int
) -> tuple[Activation | None, str]:
    """The activation that leads from ``inner`` [M, width] to ``rows`` [M, intermediate], or None and why."""
    import numpy as np

    nodes, _ = ancestors([rows], [inner])
    foreign = sorted({n.op_type for n in nodes} - _OPERATORS)
    if foreign:
        return None, f"its activation uses {', '.join(foreign)}"
    if width not in (intermediate, 2 * intermediate):
        return None, f"{width} columns become {intermediate}: neither gated nor plain"
    piece = extract(model, [inner], [rows])
    if piece is None:
        return None, "its activation depends on more than the expert's up projection"
    assert inner.dtype is not None
    dtype = "float16" if inner.dtype.name == "FLOAT16" else "float32"
    numbers = constants(nodes)
    probe = _probe(width, numbers).astype(dtype)
    try:
        got = _run(piece, str(inner.name), str(rows.name), probe)
    except Exception as error:  # onnxruntime raises its own unexported exception classes
        return None, f"its activation's nodes cannot be run alone: {str(error).splitlines()[0][:200]}"
    if got.shape != (len(probe), intermediate):
        return None, f"its activation gives {list(got.shape)} for {list(probe.shape)}"
    best: tuple[float, Activation | None] = (TOLERANCE[dtype], None)
    for candidate in _candidates(width == 2 * intermediate, numbers):
        with np.errstate(over="ignore", invalid="ignore"):
            want = activate(probe, **candidate)
        difference = _difference(got, want, _size(probe, candidate))
        if difference < best[0]:
            best = difference, candidate
    if best[1] is None:
        return None, f"its activation is none of ExpertMLP's ({', '.join(ACTIVATIONS)})"
    return best[1], ""


def _candidates(gated: bool, numbers: Sequence[float]) -> Iterator[dict[str, Any]]:
    if not gated:
        for name in _PLAIN:
            yield {"activation": name, "gated": 0, "layout": LAYOUTS[0]}
        return
    positive = sorted({abs(n) for n in numbers if n})
    for layout in LAYOUTS:
        for name in _PLAIN:
            yield {"activation": name, "gated": 1, "layout": layout}
        for alpha in positive:
            for limit in positive:
                clamped = {"activation": "clamped_swiglu", "alpha": alpha, "limit": limit}
                yield {**clamped, "gated": 1, "layout": layout}


def _probe(width: int, numbers: Sequence[float]) -> NDArray[np.float64]:
    """Rows [64, width]: normal numbers of several sizes, and every constant of the nodes from both sides.

    None beyond 16: ONNX Runtime's sigmoid is 1.5e-8 for all that is less than -18.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, width)) * np.repeat([0.1, 1.0, 3.0, 6.0], 16)[:, None]
    edges = [0.0, 1e-3, *(abs(n) for n in numbers if 0 < abs(n) < 100)]
    special = np.asarray([s * e * f for e in edges for s in (1, -1) for f in (0.999, 1.0, 1.001)])
    spots = rng.random(rows.shape) < 0.1
    rows[spots] = rng.choice(special, int(spots.sum()))
    return np.clip(rows, -16.0, 16.0)


def _run(piece: Any, source: str, target: str, probe: NDArray[Any]) -> NDArray[np.float64]:
    import numpy as np

    (got,) = session_of(piece).run([target], {source: probe})
    return np.asarray(got, np.float64)


def _size(probe: NDArray[Any], candidate: Activation) -> NDArray[np.float64]:
    """[64, I]: what the difference of each number is relative to."""
    import numpy as np

    rows = np.abs(probe.astype(np.float64))
    if not candidate["gated"]:
        return np.maximum(1.0, rows * rows)
    pair = (
        (rows[:, 0::2], rows[:, 1::2]) if candidate["layout"] == "interleaved" else np.split(rows, 2, axis=1)
    )
    # clamped_swiglu adds 1 to up before it multiplies.
    up = pair[1] + 1.0 if candidate["activation"] == "clamped_swiglu" else pair[1]
    return np.maximum(1.0, pair[0] * up)


def _difference(got: NDArray[np.float64], want: NDArray[np.float64], size: NDArray[np.float64]) -> float:
    """Largest difference relative to ``size``; infinite where one is not a number."""
    import numpy as np

    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float((np.abs(got - want) / size).max())
