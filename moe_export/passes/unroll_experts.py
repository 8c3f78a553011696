"""Lower GroupedMatMul: one MatMul per expert over its rows, or keep the op's Loop body; measured."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, choices_text
from ..graph.subgraph import session_of
from ..ops import DOMAIN, OPS, VERSION
from ..schema import Alternative, Decision
from .base import Pass, PassContext
from .unrolled_matmul import Unroller

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

MEASURE_LIMIT = 256 * 2**20
"""Bytes of weights up to which both forms are timed; larger layers follow the rule of the smaller ones."""
NODE_LIMIT = 20_000
"""Expert MatMul nodes of a whole model above which unrolling is refused: the load time grows with the
nodes."""
TOKENS = (1, 64)
LOWERINGS = ("auto", "fused", "unrolled", "loop")


@dataclass(frozen=True)
class _Kind:
    """What two GroupedMatMuls must share to be decided together."""

    experts: int
    columns: int
    rows: int
    transposed: bool
    top_k: int
    dtype: str


class UnrollExperts(Pass):
    """What :class:`FuseExperts` left. ``option expert_lowering``: ``auto`` and ``fused`` measure both forms
    on this machine, ``unrolled`` and ``loop`` force one."""

    name = "unroll-experts"

    def _run(self, context: PassContext) -> None:
        graph = context.model.graph
        unroller = Unroller(graph)
        wanted = str(context.options.get("expert_lowering", "auto"))
        if wanted not in LOWERINGS:
            raise UsageError(f"expert_lowering: unknown value {wanted!r}; {choices_text(wanted, LOWERINGS)}")
        threads, plugin = context.options.get("threads"), context.options.get("cpu_plugin")
        top_k = {layer.name: layer.top_k for layer in context.layers}
        nodes = [n for n in graph if n.domain == DOMAIN and n.op_type == "GroupedMatMul"]
        total = sum(_experts(n) for n in nodes)
        verdicts: dict[_Kind, Decision] = {}
        for node in nodes:
            layer = _layer_of(node)
            weight = node.inputs[1]
            assert weight is not None
            kind = _kind(node, top_k.get(layer, 1))
            if kind not in verdicts:
                verdicts[kind] = _decide(kind, wanted, total, context.opset, threads, plugin)
            verdict = verdicts[kind]
            subject = f"{layer}: experts {kind.experts} x [{kind.rows}, {kind.columns}]"
            if verdict.choice == "unrolled" and weight.const_value is None:
                verdict = Decision("", "loop", "the weight is computed in the graph, not a constant")
            if verdict.choice == "unrolled":
                unroller.unroll(node, drops=_may_drop(node))
            context.decisions.append(
                Decision(subject, verdict.choice, verdict.reason, verdict.alternatives, verdict.measured_ms)
            )
        _drop_unused(context.model)


def _experts(node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return int(weight.shape[0])  # type: ignore[arg-type]


def _kind(node: ir.Node, top_k: int) -> _Kind:
    import onnx_ir as ir

    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    experts, a, b = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    transposed = bool(node.attributes["transposed"].as_int())
    rows, columns = (a, b) if transposed else (b, a)
    data = node.inputs[0]
    dtype = "float16" if data is not None and data.dtype == ir.DataType.FLOAT16 else "float32"
    return _Kind(experts, columns, rows, transposed, top_k, dtype)


def _dispatch_of(node: ir.Node) -> ir.Node | None:
    """The Dispatch that sorted the rows; None where other nodes did (experts of attention)."""
    offsets = node.inputs[2]
    found = offsets.producer() if offsets is not None else None
    return found if found is not None and found.domain == DOMAIN and found.op_type == "Dispatch" else None


def _layer_of(node: ir.Node) -> str:
    dispatch = _dispatch_of(node)
    return str(node.outputs[0].name) if dispatch is None else str(dispatch.attributes["layer"].as_string())


def _may_drop(node: ir.Node) -> bool:
    dispatch = _dispatch_of(node)
    return dispatch is None or bool(dispatch.attributes["drops"].as_int())


def _decide(
    kind: _Kind, wanted: str, total: int, opset: int, threads: int | None, plugin: object
) -> Decision:
    if wanted in ("unrolled", "loop"):
        return Decision("", wanted, f"asked for by expert_lowering = {wanted}")
    if total > NODE_LIMIT:
        return Decision(
            "",
            "loop",
            f"unrolling makes {total} MatMul nodes, more than {NODE_LIMIT}: loading would take long",
            (Alternative("unrolled", "too many nodes"),),
        )
    nbytes = kind.experts * kind.rows * kind.columns * 4
    if nbytes > MEASURE_LIMIT:
        return Decision(
            "",
            "unrolled",
            f"not measured here ({nbytes / 2**20:.0f} MiB of weights in one matrix stack): "
            "the loop copies each used expert's matrix before it multiplies",
            (Alternative("loop", "copies each used expert's matrix"),),
        )
    times = _measure(kind, opset, threads, plugin)
    score = {form: statistics.geometric_mean(list(t.values())) for form, t in times.items()}
    best = min(score, key=lambda form: score[form])
    other = "loop" if best == "unrolled" else "unrolled"
    loop = "one kernel of the CPU plugin" if plugin else "the op's body"
    return Decision(
        "",
        best,
        f"faster here over {' and '.join(str(t) for t in TOKENS)} tokens "
        f"({score[other] / score[best]:.2f} times, geometric mean; the loop is {loop})",
        (Alternative(other, "slower here", times[other]),),
        times[best],
    )


def _measure(kind: _Kind, opset: int, threads: int | None, plugin: object) -> dict[str, dict[str, float]]:
    """Milliseconds (median of interleaved runs) of both forms for each number of tokens."""
    import numpy as np

    rng = np.random.default_rng(0)
    sessions = {form: session_of(_probe(kind, form, opset), threads, plugin) for form in ("unrolled", "loop")}
    out: dict[str, dict[str, float]] = {form: {} for form in sessions}
    for tokens in TOKENS:
        ids = np.stack([rng.permutation(kind.experts)[: kind.top_k] for _ in range(tokens)]).astype(np.int32)
        _, offsets, _ = OPS["Dispatch"].reference(ids, kind.experts)
        feed = {"rows": rng.standard_normal((ids.size, kind.rows)).astype(kind.dtype), "offsets": offsets}
        samples: dict[str, list[float]] = {form: [] for form in sessions}
        for turn in range(9):
            for form, session in sessions.items():
                begin = time.perf_counter()
                session.run(None, feed)
                if turn >= 2:
                    samples[form].append((time.perf_counter() - begin) * 1e3)
        for form, values in samples.items():
            out[form][f"T={tokens}"] = round(statistics.median(values), 4)
    return out


def _probe(kind: _Kind, form: str, opset: int) -> onnx.ModelProto:
    """A model with one GroupedMatMul of this kind in one of the two forms."""
    import numpy as np
    import onnx_ir as ir

    dtype = ir.DataType.FLOAT16 if kind.dtype == "float16" else ir.DataType.FLOAT
    shape = (
        (kind.experts, kind.rows, kind.columns)
        if kind.transposed
        else (kind.experts, kind.columns, kind.rows)
    )
    weight = ir.Value(
        name="weight",
        const_value=ir.tensor(
            (np.random.default_rng(1).standard_normal(shape, dtype=np.float32) * 0.02).astype(kind.dtype)
        ),
    )
    weight.dtype, weight.shape = dtype, ir.Shape(shape)
    rows = ir.Value(name="rows", shape=ir.Shape(["m", kind.rows]), type=ir.TensorType(dtype))
    offsets = ir.Value(
        name="offsets", shape=ir.Shape([kind.experts + 1]), type=ir.TensorType(ir.DataType.INT64)
    )
    attributes = {"transposed": int(kind.transposed)}
    node = ir.node("GroupedMatMul", [rows, weight, offsets], attributes=attributes, domain=DOMAIN)
    out = node.outputs[0]
    out.name, out.dtype, out.shape = "out", dtype, ir.Shape(["m", kind.columns])
    graph = ir.Graph(
        [rows, offsets],
        [out],
        nodes=[node],
        initializers=[weight],
        name="probe",
        opset_imports={"": opset, DOMAIN: VERSION},
    )
    model = ir.Model(graph, ir_version=10)
    if form == "unrolled":
        Unroller(graph).unroll(node, drops=False)
    else:
        function = ir.from_proto(OPS["GroupedMatMul"].function(attributes, opset))
        model.functions[function.identifier()] = function
    _drop_unused(model)
    proto: Any = ir.to_proto(model)
    return proto


def _drop_unused(model: ir.Model) -> None:
    """Remove weights, functions and nodes that nothing uses any more."""
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    used = {(n.domain, n.op_type) for n in model.graph.all_nodes()}
    for function in model.functions.values():
        used |= {(n.domain, n.op_type) for n in function.all_nodes()}
    for key in [k for k in model.functions if (k[0], k[1]) not in used]:
        del model.functions[key]
