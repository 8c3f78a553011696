"""Proof by running: a router's plain nodes and the Router op on inputs made to tell look-alikes apart.

Random logits prove little: a threshold, a clamp, a tie rule or a capacity matters on few of them or none. So
the inputs hold ties, masked experts, huge and tiny values, and, around every constant that the plain nodes
hold, values on both sides of it; and only operators are admitted whose behaviour such values show.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..graph.subgraph import session_of
from ..ops import DOMAIN, OPS, VERSION

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

Routing = tuple["NDArray[np.int32]", "NDArray[np.float32]"]
Runner = Callable[[dict[str, Any]], Routing]
"""Expert ids and weights, both [T, K], for ``logits`` [T, E] and ``bias`` [E]."""

WEIGHT_TOLERANCE = {"float32": 1e-6, "float16": 2e-3}
"""Largest difference of a routing weight, relative to max(1, |weight|): rounding of the same float32
arithmetic, and of the casts to float16 that a float16 router makes."""

MOST_TOKENS = 4096
"""Tokens of the longest case: more than any capacity that is tried."""

_OPERATOR_NAMES = """
Abs Add And Cast CastLike Clip Concat Constant ConstantOfShape Div Equal Exp Expand Flatten Gather
GatherElements GatherND Greater GreaterOrEqual Identity Less LessOrEqual Log LogSoftmax Max Min Mul Neg
Not Or Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape ScatterElements
ScatterND Shape Sigmoid Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose
Unsqueeze Where
"""
OPERATORS = frozenset(_OPERATOR_NAMES.split())
"""What a router's nodes may be. Not there: anything that runs along the tokens (CumSum), finds positions
(NonZero), draws numbers, or holds a graph."""


class CannotRun(Exception):
    """ONNX Runtime refused the router's nodes on their own."""


@dataclass(frozen=True)
class Cases:
    """Inputs of the proof: logits [T, E] each, and selection biases [E] (one of zeros where there is
    none)."""

    logits: tuple[NDArray[Any], ...]
    biases: tuple[NDArray[np.float32], ...]


def foreign_operators(nodes: Sequence[ir.Node]) -> list[str]:
    """Operators of ``nodes`` that the proof does not cover, sorted."""
    known = {("", name) for name in OPERATORS} | {(DOMAIN, "Router")}
    return sorted({n.op_type for n in nodes if (n.domain.replace("ai.onnx", ""), n.op_type) not in known})


def constants(nodes: Sequence[ir.Node]) -> list[float]:
    """Every number that ``nodes`` hold: constant inputs of one element and number attributes, sorted."""
    import onnx_ir as ir

    found: set[float] = set()
    for node in nodes:
        for value in node.inputs:
            tensor = None if value is None else ir.convenience.get_const_tensor(value)
            if tensor is not None and tensor.size == 1:
                found.add(float(tensor.numpy().reshape(-1)[0]))
        for attribute in node.attributes.values():
            if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.INT):
                found.add(float(attribute.value))
            elif attribute.type is ir.AttributeType.TENSOR and attribute.value.size == 1:
                found.add(float(attribute.value.numpy().reshape(-1)[0]))
    return sorted(found)


def hard_logits(num_experts: int, dtype: str, numbers: Sequence[float] = ()) -> tuple[NDArray[Any], ...]:
    """Logits [T, E] on which routers that only look alike differ.

    Ties, masked experts, equal rows, one-sided, huge and tiny values, many equal tokens (capacities), and
    both sides of each of ``numbers``, as a logit and as a score.
    """
    import numpy as np

    rng = np.random.default_rng(20261122)
    shape = (48, num_experts)
    # In steps of 1/256: two values are equal or clearly apart, so that rounding decides no order.
    normal = np.round(rng.standard_normal(shape) * 256) / 256
    masked = rng.standard_normal(shape)
    # Enough are left for every group to fill its choice: no router says what a masked expert would weigh.
    keep = max(num_experts // 2, min(num_experts, 9))
    for row in masked:
        row[rng.permutation(num_experts)[keep:]] = -np.inf
    ascending = np.sort(rng.standard_normal(shape), axis=-1)
    spread = 8.0 if dtype == "float16" else 15.0
    largest = 3e4 if dtype == "float16" else 1e30
    shifts = (20.0, -20.0, 50.0, -50.0, -85.0, -95.0, -200.0)
    cases = [
        normal,
        *(normal * factor for factor in (0.01, 5.0, 60.0, 2000.0)),
        np.round(rng.standard_normal(shape) * 1.5),
        np.zeros(shape),
        masked,
        ascending,
        -ascending,
        rng.uniform(-spread, spread, shape),
        *(normal + shift for shift in shifts),
        np.clip(normal * largest / 4, -largest, largest),
        normal[:1],
        np.zeros((_crowd(numbers), num_experts)),
    ]
    cases += [case for number in _telling(numbers, largest) for case in _around(number, normal[:8])]
    return tuple(c.astype(dtype) for c in cases)


def _crowd(numbers: Sequence[float]) -> int:
    """More tokens than any capacity among ``numbers``."""
    capacities = [int(n) for n in numbers if 48 <= n < MOST_TOKENS - 8 and n == int(n)]
    return max([64, *capacities]) + 8


def _telling(numbers: Sequence[float], largest: float) -> list[float]:
    """Numbers that a threshold or clamp may be; not 0, which every case surrounds, nor bounds of slices."""
    return [n for n in numbers if 0 < abs(n) < largest / 4][:64]


def _around(number: float, normal: NDArray[Any]) -> list[NDArray[Any]]:
    """Logits on both sides of ``number``: of single experts, of all, and such that a score comes near it."""
    import numpy as np

    step = max(abs(number), 0.1)
    cases = [normal * step * 2, number + normal * step * 0.01, -number + normal * step * 0.01]
    if 0.0 < number < 1.0:
        # One expert at a score of about ``number`` after a sigmoid, and after a softmax over itself and
        # equals.
        logit = np.log(number / (1.0 - number))
        rows = np.zeros_like(normal)
        equals = np.log(max(normal.shape[1] - 1, 1))
        for index, row in enumerate(rows):
            row[index % len(row)] = logit + (equals if index % 2 else 0.0) + (index - 3.5) * 0.02
        cases += [rows, logit + normal * 0.05]
    return cases


def hard_biases(base: NDArray[Any], numbers: Sequence[float]) -> tuple[NDArray[np.float32], ...]:
    """The model's own selection bias [E], and others: small, large, of equal values, all negative, huge.

    Float32 values that the dtype of ``base`` can hold.
    """
    import numpy as np

    noise = np.random.default_rng(7).standard_normal(base.shape)
    others = [noise * 0.1, noise * 10, np.round(noise), -np.abs(noise) - 2.0, noise * 1000, noise + 5.0]
    others += [n + noise * 0.01 * max(abs(n), 1e-3) for n in _telling(numbers, 1e5)[:8]]
    return tuple(b.astype(base.dtype).astype(np.float32) for b in (base, *others))


def nodes_runner(
    piece: onnx.ModelProto, logits: ir.Value, ids: ir.Value, weights: ir.Value, bias: ir.Value | None
) -> Runner:
    """Runs the router's own nodes (``piece``, cut out of the graph).

    The runner raises:
        CannotRun: ONNX Runtime refuses them.
    """
    session: list[Any] = []

    def run(feed: dict[str, Any]) -> Routing:
        import numpy as np

        try:
            if not session:
                session.append(session_of(piece))
            full = {str(logits.name): feed["logits"]}
            if bias is not None:
                assert bias.const_value is not None
                held = bias.const_value.numpy()
                full[str(bias.name)] = feed["bias"].reshape(held.shape).astype(held.dtype)
            found_ids, found_weights = session[0].run([str(ids.name), str(weights.name)], full)
        except Exception as error:  # onnxruntime raises its own unexported exception classes
            raise CannotRun(str(error).splitlines()[0][:200]) from error
        return np.asarray(found_ids), np.asarray(found_weights).astype(np.float32)

    return run


def op_runner(attributes: dict[str, Any], opset: int, dtype: str) -> Runner:
    """Runs the Router op's body with ``attributes``, on logits of ``dtype``."""
    session = session_of(_router_model(attributes, opset, dtype))

    def run(feed: dict[str, Any]) -> Routing:
        full = {"logits": feed["logits"]}
        if attributes["biased"]:
            full["selection_bias"] = feed["bias"]
        weights, ids = session.run(None, full)
        return ids, weights

    return run


def _router_model(attributes: dict[str, Any], opset: int, dtype: str) -> onnx.ModelProto:
    import numpy as np
    import onnx
    from onnx import helper

    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [helper.make_tensor_value_info("logits", elem, None)]
    if attributes["biased"]:
        inputs.append(helper.make_tensor_value_info("selection_bias", onnx.TensorProto.FLOAT, None))
    node = helper.make_node(
        "Router",
        ["logits", "selection_bias" if attributes["biased"] else "", ""],
        ["weights", "expert_ids"],
        domain=DOMAIN,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "router",
        inputs,
        [
            helper.make_tensor_value_info("weights", onnx.TensorProto.FLOAT, None),
            helper.make_tensor_value_info("expert_ids", onnx.TensorProto.INT32, None),
        ],
    )
    return helper.make_model(
        graph,
        functions=[OPS["Router"].function(attributes, opset)],
        ir_version=10,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
    )


def by_expert(ids: NDArray[Any], weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both [T, K], each token's experts by rising id."""
    import numpy as np

    order = np.argsort(ids, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)


def _equal(one: Routing, other: Routing, tolerance: float) -> bool:
    import numpy as np

    (a_ids, a), (b_ids, b) = by_expert(*one), by_expert(*other)
    return np.array_equal(a_ids, b_ids) and bool(
        np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    )


def proves(plain: Runner, op: Runner, cases: Cases, tolerance: float) -> bool:
    """Whether both give the same experts and weights on every case with every bias.

    Raises:
        CannotRun: see :func:`nodes_runner`.
    """
    for logits, bias in itertools.product(cases.logits, cases.biases):
        feed = {"logits": logits, "bias": bias}
        if not _equal(plain(feed), op(feed), tolerance):
            return False
    return True


def routes_each_token_alone(plain: Runner, cases: Cases, tolerance: float) -> bool:
    """Whether a token's routing is the same in another place and company.

    Raises:
        CannotRun: see :func:`nodes_runner`.
    """
    import numpy as np

    bias = cases.biases[0]
    for logits in cases.logits[:3]:
        ids, weights = plain({"logits": logits, "bias": bias})
        for chosen in (
            np.arange(len(logits))[::-1],
            np.arange(0, len(logits), 7),
            np.array([len(logits) - 1]),
        ):
            again = plain({"logits": np.ascontiguousarray(logits[chosen]), "bias": bias})
            if not _equal(again, (ids[chosen], weights[chosen]), tolerance):
                return False
    return True
