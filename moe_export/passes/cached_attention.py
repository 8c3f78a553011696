"""Attention over the KV cache as ONNX Runtime's GroupQueryAttention, where running both proves them equal.

The op appends to the cache itself and reads key and value heads without repeating them, so the cache can stay
in one buffer that is updated in place. Contract: ONNX Runtime's ContribOperators.md,
com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..graph.moe_values import find_value
from ..graph.subgraph import ancestors
from ..schema import Alternative, Decision
from .attention_proof import SHAPES, CacheAttention, fixed_dims, proven_scale
from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir


class CachedAttention(Pass):
    """Replaces each layer's attention; where all are replaced, the cache may be one buffer."""

    name = "cached-attention"

    def _run(self, context: PassContext) -> None:
        slots = {s.name: s for s in context.io.cache_inputs}
        keys = [name for name in slots if name.endswith(".key")]
        if not keys:
            return
        fused, reasons = [], {}
        for name in keys:
            layer = name.split(".")[1]
            found = _find(context.model, slots, layer)
            if isinstance(found, str):
                reasons[layer] = found
                continue
            scale = proven_scale(context, found)
            if scale is None:
                reasons[layer] = "GroupQueryAttention gives other numbers on the test shapes"
                continue
            _replace(context.model, found, scale)
            fused.append(layer)
        if fused:
            context.model.graph.opset_imports["com.microsoft"] = 1
        self._report(context, fused, reasons, len(slots))

    def _report(self, context: PassContext, fused: list[str], reasons: dict[str, str], slots: int) -> None:
        for reason in sorted(set(reasons.values())):
            layers = [layer for layer, text in reasons.items() if text == reason]
            context.decisions.append(
                Decision(f"attention of layers {', '.join(layers)}", "plain nodes", reason)
            )
        if not fused:
            return
        shared = not reasons and slots == 2 * len(fused) and _use_mask_for_past_length(context)
        cache = (
            "in one buffer, updated in place" if shared else "written as a new tensor each step by the graph"
        )
        context.decisions.append(
            Decision(
                f"attention of layers {', '.join(fused)}",
                f"GroupQueryAttention; KV cache {cache}",
                "equal to the plain nodes on " + ", ".join(f"(B={b}, S={s}, past={p})" for b, s, p in SHAPES),
                (Alternative("plain nodes", "repeat the key and value heads and copy the cache every step"),),
            )
        )
        context.rows_apart = True
        context.cache = "shared" if shared else "growing"


def _follow(value: ir.Value, wanted: str, depth: int = 14) -> ir.Node | None:
    """The first node of type ``wanted`` that uses what comes from ``value``."""
    frontier = [value]
    for _ in range(depth):
        nodes = {id(n): n for v in frontier for n, _ in v.uses()}
        for node in nodes.values():
            if node.op_type == wanted:
                return node
        frontier = [
            out
            for node in nodes.values()
            if node.op_type != "MatMul" or wanted != "MatMul"
            for out in node.outputs
        ]
    return None


def _back_to_matmul(value: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """From a softmax's input back over Add and Mul/Div by a constant: the scores' MatMul and the bias.

    Scores that something else reads (a logsumexp that gates the output) would be computed beside the op.
    """
    bias: ir.Value | None = None
    for _ in range(6):
        node = value.producer()
        if node is None or len(list(value.uses())) != 1:
            return None, None
        if node.op_type == "MatMul":
            return node, bias
        data = [v for v in node.inputs if v is not None and v.const_value is None]
        if node.op_type in ("Mul", "Div", "Cast") and len(data) == 1:
            value = data[0]
        elif node.op_type == "Add" and len(data) == 2 and bias is None:
            scores = [v for v in data if _leads_to_matmul(v)]
            if len(scores) != 1:
                return None, None
            value = scores[0]
            bias = data[0] if data[1] is value else data[1]
        else:
            return None, None
    return None, None


def _unscaled(query: ir.Value) -> ir.Value:
    """``query`` before a multiplication with one number, which the op's own scale can do."""
    node = query.producer()
    if node is None or node.op_type != "Mul":
        return query
    data = [v for v in node.inputs if v is not None and v.const_value is None]
    numbers = [
        v for v in node.inputs if v is not None and v.const_value is not None and v.const_value.size == 1
    ]
    return data[0] if len(data) == 1 and len(numbers) == 1 else query


def _leads_to_matmul(value: ir.Value) -> bool:
    for _ in range(4):
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "MatMul":
            return True
        data = [v for v in node.inputs if v is not None and v.const_value is None]
        if node.op_type not in ("Mul", "Div", "Cast") or len(data) != 1:
            return False
        value = data[0]
    return False


def _find(model: ir.Model, slots: dict[str, Any], layer: str) -> CacheAttention | str:
    """The attention of ``layer``, or why it is not of the form."""
    values = {}
    for part in ("key", "value"):
        spec = slots.get(f"past.{layer}.{part}")
        past = find_value(model, f"past.{layer}.{part}")
        if spec is None or past is None or len(spec.shape) != 4 or spec.shape[2] != "past":
            return "its cache is not keys and values [batch, heads, past, head size]"
        present = find_value(model, f"present.{layer}.{part}")
        node = present.producer() if present is not None else None
        if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or node.inputs[0] is not past:
            return "its cache is not extended by a plain concatenation"
        values[part] = (past, node.inputs[1], present, spec.shape)
    past_key, key, present_key, key_shape = values["key"]
    past_value, value, present_value, value_shape = values["value"]
    if key_shape != value_shape or not all(isinstance(key_shape[i], int) for i in (1, 3)):
        return "its keys and values differ in heads or head size"
    kv_heads, head_size = int(key_shape[1]), int(key_shape[3])
    if head_size % 8:
        return f"head size {head_size} is not a multiple of 8"
    assert present_key is not None and present_value is not None and key is not None and value is not None
    if key is value:
        return "its new keys and values are one tensor"
    softmax = _follow(present_key, "Softmax")
    second = _follow(softmax.outputs[0], "MatMul", 3) if softmax is not None else None
    if softmax is None or second is None or softmax.inputs[0] is None:
        return "no softmax over its keys was found"
    first, bias = _back_to_matmul(softmax.inputs[0])
    if first is None or bias is None or first.inputs[0] is None:
        return "its scores are not query times key plus a mask, for the softmax alone (sinks, soft caps)"
    query, output = _unscaled(first.inputs[0]), second.outputs[0]
    query_dims = fixed_dims(query)
    if len(query_dims) != 4 or query_dims[1] is None:
        query_dims = fixed_dims(output)
    if len(query_dims) != 4 or query_dims[1] is None or query_dims[1] % kv_heads:
        return "its query has no fixed number of heads"
    if ancestors([bias, query], [present_key, present_value])[1]:
        return "its mask or query is computed from the updated cache"
    if bias.shape is None or len(bias.shape) != 4:
        return "its mask is not of four axes"
    return CacheAttention(
        layer, query, key, value, past_key, past_value, present_key, present_value, bias, output,
        query_dims[1], kv_heads, head_size,
    )  # fmt: skip


def _replace(model: ir.Model, found: CacheAttention, scale: float) -> None:
    import numpy as np
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    graph = model.graph
    tape: list[ir.Node] = []
    dtype = found.query.dtype

    def add(
        op: str, inputs: list[ir.Value | None], outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        node = ir.node(op, inputs, attributes=attributes, num_outputs=outputs, domain=domain)
        tape.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(name: str, values: Any) -> ir.Value:
        held = graph.initializers.get(name)
        if held is None:
            array = np.asarray(values)
            held = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            held.dtype, held.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            graph.register_initializer(held)
        return held

    merge = constant("attention.merge", np.asarray([0, 0, -1], np.int64))

    def flat(value: ir.Value) -> ir.Value:
        """[B, heads, S, D] → [B, S, heads*D], without the transpose where there was one to begin with."""
        node = value.producer()
        before = None
        if node is not None and node.op_type == "Transpose":
            before = node.inputs[0] if list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3] else None
        rows = before if before is not None else add("Transpose", [value], perm=[0, 2, 1, 3])
        return add("Reshape", [rows, merge])

    query, key, value = flat(found.query), flat(found.key), flat(found.value)
    name = f"attention.{found.layer}"
    batch = add("Shape", [found.query], start=0, end=1)
    total = add("Cast", [add("Shape", [found.bias], start=3, end=4)], to=ir.DataType.INT32.value)
    last = add("Sub", [total, constant("attention.one", np.asarray([1], np.int32))])
    lengths, total_0d = add("Expand", [last, batch]), add("Squeeze", [total])
    out, present_key, present_value = add(
        "GroupQueryAttention",
        [query, key, value, found.past_key, found.past_value, lengths, total_0d, *[None] * 3, found.bias],
        outputs=3, domain="com.microsoft", num_heads=found.heads, kv_num_heads=found.kv_heads, scale=scale,
    )  # fmt: skip
    out.name = f"{name}.output"
    heads = add(
        "Reshape",
        [
            out,
            constant(
                f"attention.split.{found.heads}.{found.head_size}",
                np.asarray([0, 0, found.heads, found.head_size], np.int64),
            ),
        ],
    )
    swapped = add("Transpose", [heads], perm=[0, 2, 1, 3])
    for new in (query, key, value, out, heads, swapped):
        new.dtype = dtype
    if found.query.shape is not None:
        rows, length = found.query.shape[0], found.query.shape[2]
        out.shape = ir.Shape([rows, length, found.heads * found.head_size])
        heads.shape = ir.Shape([rows, length, found.heads, found.head_size])
    anchor = found.output.producer()
    assert anchor is not None
    graph.insert_before(anchor, tape)
    for user, index in list(found.output.uses()):
        if user.op_type == "Transpose" and list(user.attributes["perm"].as_ints()) == [0, 2, 1, 3]:
            user.outputs[0].replace_all_uses_with(heads, replace_graph_outputs=True)
        else:
            user.replace_input_with(index, swapped)
    for old, new in ((found.present_key, present_key), (found.present_value, present_value)):
        old_name = old.name
        new.dtype, new.shape = old.dtype, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{old_name}.plain", old_name
    common.RemoveUnusedNodesPass()(model)
    graph.sort()


def _use_mask_for_past_length(context: PassContext) -> bool:
    """Take the past's length from mask and ids instead of from the cache's shape, which is then the buffer's.

    Returns whether nothing but the attentions reads the cache any more.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    graph = context.model.graph
    by_name = {v.name: v for v in graph.inputs}
    mask, ids = by_name.get("attention_mask"), by_name.get("input_ids")
    if mask is None or ids is None:
        return False
    outputs = {v.name: v for v in graph.outputs}
    if any(spec.pair in outputs and list(outputs[spec.pair].uses()) for spec in context.io.cache_inputs):
        return False
    lengths: dict[tuple[int, int], ir.Value] = {}
    for spec in context.io.cache_inputs:
        for node, _ in list(by_name[spec.name].uses()):
            if node.op_type == "GroupQueryAttention":
                continue
            if node.op_type != "Shape":
                return False
            start = node.attributes["start"].as_int() if "start" in node.attributes else 0
            end = node.attributes["end"].as_int() if "end" in node.attributes else 4
            if end - start != 1 or start not in (0, 2):
                return False
            if start not in {k[0] for k in lengths}:
                made = []
                if start == 0:
                    made.append(ir.node("Shape", [ids], attributes={"start": 0, "end": 1}))
                else:
                    a = ir.node("Shape", [mask], attributes={"start": 1, "end": 2})
                    b = ir.node("Shape", [ids], attributes={"start": 1, "end": 2})
                    made += [a, b, ir.node("Sub", [a.outputs[0], b.outputs[0]])]
                graph.insert_before(next(iter(graph)), made)
                for new in made:
                    new.outputs[0].dtype, new.outputs[0].shape = ir.DataType.INT64, ir.Shape([1])
                lengths[(start, end)] = made[-1].outputs[0]
            node.outputs[0].replace_all_uses_with(lengths[(start, end)])
    common.RemoveUnusedNodesPass()(context.model)
    return True
