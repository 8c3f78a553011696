"""Replace a router's plain nodes by one Router op, where running both on hard inputs proves them equal."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..graph.functions import attach_functions
from ..graph.moe_values import find_value
from ..graph.subgraph import ancestors, extract
from ..ops import DOMAIN, OPS, VERSION
from ..schema import Decision, MoELayer
from .base import Pass, PassContext

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

Runner = Callable[[dict[str, Any]], "tuple[NDArray[np.int32], NDArray[np.float32]]"]

WEIGHT_TOLERANCE = {"float32": 1e-6, "float16": 2e-3}
"""Largest difference of a routing weight, relative to max(1, |weight|): rounding of the same float32
arithmetic, and of the casts to float16 that a float16 router makes."""


def hard_logits(num_experts: int, dtype: str) -> list[NDArray[Any]]:
    """Logits [T, E] on which routers that only look alike differ: ties, one-sided, huge, tiny, -inf, equal
    rows."""
    import numpy as np

    rng = np.random.default_rng(20261122)
    shape = (48, num_experts)
    normal = rng.standard_normal(shape)
    ties = np.round(rng.standard_normal(shape) * 1.5)
    masked = rng.standard_normal(shape)
    keep = max(num_experts // 2, min(num_experts, 9))
    for row in masked:
        row[rng.permutation(num_experts)[keep:]] = -np.inf
    ascending = np.sort(rng.standard_normal(shape), axis=-1)
    spread = 8.0 if dtype == "float16" else 15.0
    cases = [
        normal,
        normal * 0.01,
        normal * 5,
        normal * 60,
        ties,
        np.zeros(shape),
        masked,
        ascending,
        -ascending,
        rng.uniform(-spread, spread, shape),
        normal + 20.0,
        normal - 20.0,
        normal[:1],
    ]
    return [c.astype(dtype) for c in cases]


class AttachRouter(Pass):
    """For each MoE layer: find the logits, name what leads from them to the routing, prove it, replace it."""

    name = "attach-router"

    def _run(self, context: PassContext) -> None:
        layers = []
        chosen: tuple[Any, ...] | None = None
        for layer in context.layers:
            found, note, logits = self._attach(context, layer, chosen)
            if found is not None:
                chosen = OPS["Router"].variant(found)
            layers.append(
                dataclasses.replace(
                    layer,
                    router=None if found is None else {**found, **_held_bias(context.model, layer)},
                    router_note=note,
                    logits=None if logits is None else f"moe.{layer.index}.logits",
                )
            )
            context.decisions.append(
                Decision(
                    subject=layer.name or f"moe.{layer.index}",
                    choice="Router op" if found is not None else "router as plain nodes",
                    reason=note,
                )
            )
        context.layers = tuple(layers)
        if chosen is not None:
            context.model.graph.opset_imports[DOMAIN] = VERSION

    def _attach(
        self, context: PassContext, layer: MoELayer, variant: tuple[Any, ...] | None
    ) -> tuple[dict[str, Any] | None, str, ir.Value | None]:
        model = context.model
        ids, weights = find_value(model, layer.expert_ids), find_value(model, layer.weights)
        assert ids is not None and weights is not None
        producer = ids.producer()
        if producer is not None and producer.domain == DOMAIN and producer.op_type == "Router":
            attributes = OPS["Router"].complete({k: a.value for k, a in producer.attributes.items()})
            logits = producer.inputs[0]
            return attributes, "the adapter states the Router op", logits
        reasons = []
        for logits in _logit_candidates(ids, weights, layer.num_experts):
            found, reason = _recognise(context, layer, logits, ids, weights)
            if found is None:
                reasons.append(reason)
                continue
            attributes, bias = found
            if variant is not None and OPS["Router"].variant(attributes) != variant:
                return (
                    None,
                    "differs in form from the model's other routers; one body cannot serve both",
                    None,
                )
            _replace(model, layer, logits, ids, weights, attributes, bias)
            return (
                attributes,
                "equal to the Router op on ties, masked experts, extreme logits and biases",
                logits,
            )
        return None, reasons[0] if reasons else "no single logits value [T, E] leads to the routing", None


def _held_bias(model: ir.Model, layer: MoELayer) -> dict[str, list[float]]:
    """The selection bias of the layer's Router op, for the manifest: near ties are judged with it.

    Empty without a bias, and for one that is computed rather than stored.
    """
    import numpy as np

    ids = find_value(model, layer.expert_ids)
    node = None if ids is None else ids.producer()
    if node is None or len(node.inputs) < 2:
        return {}
    bias = node.inputs[1]
    cast = None if bias is None else bias.producer()
    if cast is not None and cast.op_type in ("Cast", "Reshape", "Identity"):
        bias = cast.inputs[0]
    if bias is None or bias.const_value is None:
        return {}
    held = bias.const_value.numpy().astype(np.float32).reshape(-1)
    return {"selection_bias": held.tolist()} if held.size == layer.num_experts else {}


def _logit_candidates(ids: ir.Value, weights: ir.Value, num_experts: int) -> Iterator[ir.Value]:
    """Float values [.., E] that everything between them and the routing depends on, farthest first."""
    nodes, _ = ancestors([ids, weights])
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


def _scalars(nodes: Sequence[ir.Node]) -> list[float]:
    values = []
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.const_value.size == 1:
                values.append(float(value.const_value.numpy().reshape(-1)[0]))
    return values


def _recognise(
    context: PassContext, layer: MoELayer, logits: ir.Value, ids: ir.Value, weights: ir.Value
) -> tuple[tuple[dict[str, Any], ir.Value | None] | None, str]:
    nodes, _ = ancestors([ids, weights], [logits])
    rank = len(logits.shape) if logits.shape is not None else 0
    if rank != 2:
        return (
            None,
            f"router logits of {logits.name} have {rank} axes: routing depends on more than the token",
        )
    biases = []
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.const_value is not None:
                shape = [int(d) for d in value.const_value.shape]
                if shape and shape[-1] == layer.num_experts and value.const_value.size == layer.num_experts:
                    biases.append(value)
    if len({id(b) for b in biases}) > 1:
        return None, "the router uses several vectors of one number per expert"
    bias = biases[0] if biases else None
    piece = extract(context.model, [logits], [ids, weights], [bias] if bias is not None else [])
    if piece is None:
        return None, "the routing depends on more than the router logits"
    plain = _runner(piece, logits, ids, weights, bias)
    try:
        return _search(context, layer, plain, nodes, bias, str(logits.dtype.numpy()))  # type: ignore[union-attr]
    except _CannotRun as error:
        return None, f"the router's nodes cannot be run alone: {error}"


class _CannotRun(Exception):
    """ONNX Runtime refused the extracted piece."""


def _runner(
    piece: onnx.ModelProto, logits: ir.Value, ids: ir.Value, weights: ir.Value, bias: ir.Value | None
) -> Runner:
    session: list[Any] = []

    def run(feed: dict[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        import numpy as np
        import onnxruntime as ort

        try:
            if not session:
                options = ort.SessionOptions()
                options.log_severity_level = 4
                options.intra_op_num_threads = 1
                session.append(
                    ort.InferenceSession(
                        piece.SerializeToString(), options, providers=["CPUExecutionProvider"]
                    )
                )
            full = {str(logits.name): feed["logits"]}
            if bias is not None:
                assert bias.const_value is not None
                full[str(bias.name)] = feed["bias"].reshape(tuple(bias.const_value.shape.numpy()))
            found_ids, found_weights = session[0].run([str(ids.name), str(weights.name)], full)
        except Exception as error:  # onnxruntime raises its own unexported exception classes
            raise _CannotRun(str(error).splitlines()[0][:200]) from error
        return np.asarray(found_ids), np.asarray(found_weights).astype(np.float32)

    return run


def _router_model(attributes: dict[str, Any], opset: int, dtype: str) -> onnx.ModelProto:
    import onnx
    from onnx import helper

    elem = helper.np_dtype_to_tensor_dtype(_numpy_dtype(dtype))
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


def _numpy_dtype(name: str) -> Any:
    import numpy as np

    return np.dtype(name)


def _search(
    context: PassContext,
    layer: MoELayer,
    plain: Runner,
    nodes: Sequence[ir.Node],
    bias: ir.Value | None,
    dtype: str,
) -> tuple[tuple[dict[str, Any], ir.Value | None] | None, str]:
    import numpy as np

    dtype = "float16" if "float16" in dtype else "float32"
    experts = layer.num_experts
    cases = hard_logits(experts, dtype)
    base = np.zeros(experts, np.float32)
    if bias is not None:
        assert bias.const_value is not None
        base = bias.const_value.numpy().astype(np.float32).reshape(-1)
    probe = cases[0]
    want_ids, want_weights = plain({"logits": probe, "bias": base})
    if want_ids.ndim != 2 or want_ids.shape[0] != probe.shape[0]:
        return None, f"the routing of one token has shape {want_ids.shape[1:]}, expected [K]"
    scalars = _scalars(nodes)
    for attributes in _candidates(layer, nodes, scalars, bias is not None):
        weights, ids = OPS["Router"].reference(probe, base if attributes["biased"] else None, **attributes)
        scaled = _fit_scale(want_ids, want_weights, ids, weights, scalars, WEIGHT_TOLERANCE[dtype])
        if scaled is None:
            continue
        full = OPS["Router"].complete({**attributes, "scale": scaled, "layer": layer.name})
        if _proves(plain, full, cases, base, bias, context.opset, dtype):
            return (full, bias if attributes["biased"] else None), ""
    return (
        None,
        "no Router parameters give the same routing on hard inputs (ties, masked experts, extreme logits)",
    )


def _candidates(
    layer: MoELayer, nodes: Sequence[ir.Node], scalars: Sequence[float], has_bias: bool
) -> Iterator[dict[str, Any]]:
    epsilons = sorted({0.0} | {s for s in scalars if 0 < s < 1e-3}, reverse=True)
    top_ks = sum(1 for n in nodes if n.op_type == "TopK")
    groupings: list[dict[str, Any]] = [{}]
    if top_ks > 1:
        sizes = [g for g in range(2, layer.num_experts) if layer.num_experts % g == 0]
        counts = (
            sorted({int(s) for s in scalars if 1 <= s <= layer.num_experts and s == int(s)})
            if scalars
            else []
        )
        for n_group, score, mask in itertools.product(sizes, ("max", "top2_sum"), ("minus_infinity", "zero")):
            for topk_group in range(1, n_group + 1):
                if counts and topk_group not in counts:
                    continue
                if topk_group * (layer.num_experts // n_group) < layer.top_k:
                    continue
                groupings.append(
                    {"n_group": n_group, "topk_group": topk_group, "group_score": score, "group_mask": mask}
                )
        groupings = groupings[1:] + groupings[:1]
    for grouping in groupings:
        for score in ("softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"):
            for biased in (1, 0) if has_bias else (0,):
                for renormalize in (0, 1) if score != "softmax_after_topk" else (0,):
                    for epsilon in epsilons if renormalize else (0.0,):
                        yield {
                            "top_k": layer.top_k,
                            "score": score,
                            "renormalize": renormalize,
                            "epsilon": epsilon,
                            "biased": biased,
                            **grouping,
                        }


def _by_expert(ids: NDArray[Any], weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    order = np.argsort(ids, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)


def _fit_scale(
    want_ids: NDArray[Any],
    want_weights: NDArray[Any],
    ids: NDArray[Any],
    weights: NDArray[Any],
    scalars: Sequence[float],
    tolerance: float,
) -> float | None:
    """The factor between two routings of the same sets, from the graph's own constants, or None."""
    import numpy as np

    a_ids, a = _by_expert(want_ids, want_weights)
    b_ids, b = _by_expert(ids, weights)
    if a_ids.shape != b_ids.shape or not np.array_equal(a_ids, b_ids):
        return None
    for scale in [1.0, *scalars]:
        if np.allclose(a, b * scale, rtol=max(tolerance * 10, 1e-5), atol=max(tolerance, 1e-6)):
            return float(scale)
    return None


def _proves(
    plain: Runner,
    attributes: dict[str, Any],
    cases: Sequence[NDArray[Any]],
    base: NDArray[np.float32],
    bias: ir.Value | None,
    opset: int,
    dtype: str,
) -> bool:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        _router_model(attributes, opset, dtype).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    rng = np.random.default_rng(7)
    biases = [base]
    if bias is not None:
        noise = rng.standard_normal(base.shape).astype(np.float32)
        biases += [noise * 0.1, noise * 10, np.round(noise), -np.abs(noise) - 2.0]
    tolerance = WEIGHT_TOLERANCE[dtype]
    for logits, vector in itertools.product(cases, biases):
        want_ids, want = plain({"logits": logits, "bias": vector})
        feed = {"logits": logits}
        if attributes["biased"]:
            feed["selection_bias"] = vector
        weights, ids = session.run(None, feed)
        a_ids, a = _by_expert(want_ids, want)
        b_ids, b = _by_expert(ids, weights)
        if not np.array_equal(a_ids, b_ids):
            return False
        if not np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
            return False
    return True


def _replace(
    model: ir.Model,
    layer: MoELayer,
    logits: ir.Value,
    ids: ir.Value,
    weights: ir.Value,
    attributes: dict[str, Any],
    bias: ir.Value | None,
) -> None:
    import onnx_ir as ir

    name = f"moe.{layer.index}.logits"
    producer = logits.producer()
    assert producer is not None
    taken = logits.name is not None and logits.name.startswith("moe.")
    if taken:
        copy = ir.node("Identity", [logits])
        copy.outputs[0].type, copy.outputs[0].shape = logits.type, logits.shape
        model.graph.insert_after(producer, copy)
        producer, logits = copy, copy.outputs[0]
    logits.name = name
    inputs: list[ir.Value | None] = [logits, bias, None]
    if bias is not None and bias.const_value is not None and len(bias.const_value.shape) != 1:
        flat = ir.Value(
            name=f"moe.{layer.index}.selection_bias",
            const_value=ir.tensor(bias.const_value.numpy().reshape(-1)),
        )
        flat.dtype, flat.shape = bias.dtype, ir.Shape([layer.num_experts])
        model.graph.register_initializer(flat)
        inputs[1] = flat
    node = ir.node("Router", inputs, attributes=attributes, domain=DOMAIN, num_outputs=2)
    for old, new in ((weights, node.outputs[0]), (ids, node.outputs[1])):
        new.type, new.shape = old.type, old.shape
        old_name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{old_name}.plain", old_name
    model.graph.insert_after(producer, node)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    attach_functions(model, model.graph.opset_imports[""])
