"""Attention masks without what is known before they are computed.

transformers writes a mask as ``causal and padding``, [batch, 1, sequence, total], by index arithmetic that
serves every kind of mask. For a plain causal mask most of it says nothing:

- the padding mask is read by a gather whose indices are all positions in order;
- GroupQueryAttention is causal itself (ContribOperators.md), so its bias needs the padding only;
- a query has a key to look at exactly where the running count of unpadded keys is not 0.

Each rewrite gives the same numbers wherever they are read. Masks with a window, chunks or blocks stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..schema import Decision
from .base import Pass, PassContext

if TYPE_CHECKING:
    import onnx_ir as ir

_BIAS = 10
"""GroupQueryAttention's input ``attention_bias``."""
_FAR = 2**62


class CausalMasks(Pass):
    """Drops masks' nodes that compute what is known; see the module."""

    name = "causal-masks"

    def _run(self, context: PassContext) -> None:
        import onnx_ir.passes.common as common

        graph = context.model.graph
        count = len(list(graph))
        _drop_identities(graph)
        common.RemoveUnusedNodesPass()(context.model)
        biases = rows = 0
        for node in list(graph):
            mask = _causal_and_padding(node)
            if mask is not None:
                biases += _bias_of_padding(graph, mask)
                rows += _rows_by_running_count(graph, mask)
        merged = sum(_mask_merged_heads(graph, node) for node in list(graph) if node.op_type == "Where")
        common.RemoveUnusedNodesPass()(context.model)
        graph.sort()
        left = len(list(graph))
        if left < count:
            context.decisions.append(
                Decision(
                    "attention masks",
                    f"{count} nodes became {left}",
                    f"{biases} causal biases left to GroupQueryAttention, {rows} counts of visible keys by a "
                    f"running sum, {merged} outputs masked before their heads are split; same numbers",
                )
            )


@dataclass(frozen=True)
class _Mask:
    """``allowed`` [B, 1, S, T] = (key <= query) and ``padding`` [B, 1, 1, T]; T = ``past`` + ``sequence``."""

    allowed: ir.Value
    padding: ir.Value
    sequence: ir.Value
    past: ir.Value | None


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Both shapes are known, and equal by their symbols."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    pairs = [(str(x), str(y)) for x, y in zip(a.shape, b.shape, strict=True)]
    return all(x == y and x not in ("None", "?") for x, y in pairs)


def _made_by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in ops and node.domain == "" else None


def _number(value: ir.Value | None) -> float | None:
    """The one number of a constant."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(-1)[0])


def _without(value: ir.Value | None, *ops: str) -> ir.Value | None:
    """``value`` before nodes of these types, which change its shape only."""
    while (node := _made_by(value, *ops)) is not None:
        value = node.inputs[0]
    return value


def _range_limit(value: ir.Value | None) -> ir.Value | None:
    """``n`` of a ``Range(0, n, 1)``."""
    node = _made_by(value, "Range")
    if node is None or _number(node.inputs[0]) != 0 or _number(node.inputs[2]) != 1:
        return None
    return node.inputs[1]


def _data(node: ir.Node) -> list[ir.Value]:
    return [v for v in node.inputs if v is not None and v.const_value is None]


def _drop_identities(graph: ir.Graph) -> None:
    """``true and x``, an Expand to the shape that is there, a gather of everything in order."""
    for node in list(graph):
        out = node.outputs[0]
        if out.is_graph_output():
            continue
        source: ir.Value | None = None
        if node.op_type == "And":
            data = _data(node)
            constants = [v for v in node.inputs if v is not None and v.const_value is not None]
            if len(data) == 1 and len(constants) == 1 and bool(_array(constants[0]).all()):
                source = data[0]
        elif node.op_type == "Expand":
            source = node.inputs[0]
        elif node.op_type == "GatherND":
            source = _whole_gather(graph, node)
        if source is not None and _same_shape(source, out):
            out.replace_all_uses_with(source)


def _array(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()


def _whole_gather(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """[B, T] read at every (row, column) in order, as a view [B, 1, 1, T] made before ``node``."""
    import onnx_ir as ir

    data, indices = node.inputs
    joined = _made_by(indices, "Concat")
    if data is None or data.shape is None or len(data.shape) != 2:
        return None
    if joined is None or len(joined.inputs) != 2:
        return None
    if "batch_dims" in node.attributes and node.attributes["batch_dims"].as_int():
        return None
    out = node.outputs[0]
    if out.shape is None or [str(d) for d in out.shape][1:3] != ["1", "1"] or len(out.shape) != 4:
        return None
    for axis, part in enumerate(joined.inputs):
        base = _without(part, "Unsqueeze", "Expand")
        if _range_limit(base) is None or base is None or base.shape is None or len(base.shape) != 1:
            return None
        if str(base.shape[0]) != str(data.shape[axis]):
            return None
        if not _spans(part, 3 * axis):
            return None
    view = ir.node("Unsqueeze", [data, _constant(graph, "mask.axes.1.2", [1, 2])])
    view.outputs[0].type, view.outputs[0].shape = data.type, out.shape
    graph.insert_before(node, [view])
    return view.outputs[0]


def _spans(part: ir.Value | None, axis: int) -> bool:
    """The range inside ``part`` [B, 1, 1, T, 1] lies along ``axis``: before Expand, it alone is not 1."""
    value = _made_by(part, "Unsqueeze")
    expand = _made_by(value.inputs[0], "Expand") if value is not None else None
    source = expand.inputs[0] if expand is not None else None
    if source is None or source.shape is None:
        return False
    dims = ["1"] * (4 - len(source.shape)) + [str(d) for d in source.shape]
    return all((d == "1") != (i == axis) for i, d in enumerate(dims))


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    held = graph.initializers.get(name)
    if held is None:
        held = ir.Value(name=name, const_value=ir.tensor(np.asarray(numbers, np.int64), name=name))
        held.dtype, held.shape = ir.DataType.INT64, ir.Shape([len(numbers)])
        graph.register_initializer(held)
    return held


def _causal_and_padding(node: ir.Node) -> _Mask | None:
    """The mask that ``node`` makes, if it is ``causal and padding``."""
    if node.op_type != "And" or len(_data(node)) != 2:
        return None
    for causal, padding in (_data(node), _data(node)[::-1]):
        compare = _made_by(causal, "LessOrEqual")
        shape = padding.shape
        if compare is None or shape is None or [str(d) for d in shape][1:3] != ["1", "1"] or len(shape) != 4:
            continue
        key, query = compare.inputs
        if not _lies_along(key, 3) or not _lies_along(query, 2):
            continue
        total = _range_limit(_without(key, "Unsqueeze"))
        position = _without(query, "Unsqueeze")
        sequence, past = _range_limit(position), None
        shifted = _made_by(position, "Add")
        if shifted is not None:
            for base, shift in (tuple(shifted.inputs), tuple(shifted.inputs)[::-1]):
                if (limit := _range_limit(base)) is not None:
                    sequence, past = limit, shift
        if total is None or sequence is None:
            continue
        if past is None:
            whole = total is sequence
        else:
            sum_ = _made_by(total, "Add")
            whole = sum_ is not None and {id(v) for v in sum_.inputs} == {id(past), id(sequence)}
        if whole:
            return _Mask(node.outputs[0], padding, sequence, past)
    return None


def _lies_along(value: ir.Value | None, axis: int) -> bool:
    if value is None or value.shape is None or len(value.shape) != 4:
        return False
    return all(i == axis or str(d) == "1" for i, d in enumerate(value.shape))


def _bias_of_padding(graph: ir.Graph, mask: _Mask) -> int:
    """Compute the biases that GroupQueryAttention reads from the padding alone; returns how many."""
    made: dict[str | None, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "GroupQueryAttention" or len(node.inputs) <= _BIAS:
            continue
        bias = node.inputs[_BIAS]
        if bias is None:
            continue
        if bias.name not in made:
            chain = _chain(bias, mask.allowed)
            if chain is None:
                continue
            made[bias.name] = _replayed(graph, chain, mask, node)
        node.replace_input_with(_BIAS, made[bias.name])
        for user, index in list(bias.uses()):
            if user.op_type == "Shape":
                user.replace_input_with(index, made[bias.name])
    return len(made)


def _chain(value: ir.Value, start: ir.Value) -> list[ir.Node] | None:
    """The elementwise nodes from ``start`` to ``value``, each with constants of one number beside it."""
    nodes: list[ir.Node] = []
    while value is not start:
        node = _made_by(value, "Not", "Cast", "Mul", "Add", "Sub", "Where")
        data = _data(node) if node is not None else []
        if node is None or len(data) != 1 or len(nodes) > 8:
            return None
        if any(v.const_value.size != 1 for v in node.inputs if v is not None and v.const_value is not None):
            return None
        nodes.append(node)
        value = data[0]
    return nodes[::-1]


def _replayed(graph: ir.Graph, chain: list[ir.Node], mask: _Mask, anchor: ir.Node) -> ir.Value:
    """``chain`` on the padding [B, 1, 1, T], then repeated for every query: [B, 1, S, T]."""
    import onnx_ir as ir

    tape: list[ir.Node] = []
    value = mask.padding
    for node in chain:
        inputs = [value if v is not None and v.const_value is None else v for v in node.inputs]
        copy = ir.node(node.op_type, inputs, attributes=dict(node.attributes))
        copy.outputs[0].type, copy.outputs[0].shape = node.outputs[0].type, mask.padding.shape
        tape.append(copy)
        value = copy.outputs[0]
    # The axis of length 1 becomes S; all others are as they are (Expand broadcasts 1).
    rows = ir.node("Reshape", [mask.sequence, _constant(graph, "mask.one", [-1])])
    one = _constant(graph, "mask.axis", [1])
    shape = ir.node("Concat", [one, one, rows.outputs[0], one], attributes={"axis": 0})
    for node in (rows, shape):
        node.outputs[0].dtype = ir.DataType.INT64
    rows.outputs[0].shape, shape.outputs[0].shape = ir.Shape([1]), ir.Shape([4])
    wide = ir.node("Expand", [value, shape.outputs[0]])
    wide.outputs[0].type, wide.outputs[0].shape = value.type, mask.allowed.shape
    graph.insert_before(anchor, [*tape, rows, shape, wide])
    return wide.outputs[0]


def _rows_by_running_count(graph: ir.Graph, mask: _Mask) -> int:
    """Replace sums of ``allowed`` over the keys [B, 1, S, 1] by a running count; returns how many."""
    done = 0
    for cast, _ in list(mask.allowed.uses()):
        if cast.op_type != "Cast":
            continue
        for node, _ in list(cast.outputs[0].uses()):
            if _sums_last_axis(node):
                node.outputs[0].replace_all_uses_with(_running_count(graph, mask, node))
                done += 1
    return done


def _sums_last_axis(node: ir.Node) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
    return node.op_type == "ReduceSum" and keeps and _number(axes) in (-1, 3)


def _running_count(graph: ir.Graph, mask: _Mask, node: ir.Node) -> ir.Value:
    """Unpadded keys up to each query, [B, 1, S, 1], in the dtype of ``node``'s sum; made before ``node``."""
    import onnx_ir as ir

    tape: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        tape.append(ir.node(op, list(inputs), attributes=attributes))
        return tape[-1].outputs[0]

    old = node.outputs[0]
    axis = _constant(graph, "mask.axis.3", [3])
    value = add("CumSum", add("Cast", mask.padding, to=ir.DataType.FLOAT.value), axis)
    if mask.past is not None:
        begin = add("Reshape", mask.past, _constant(graph, "mask.one", [-1]))
        value = add("Slice", value, begin, _constant(graph, "mask.far", [_FAR]), axis)
    value = add("Transpose", value, perm=[0, 1, 3, 2])
    if old.dtype is not None and old.dtype != ir.DataType.FLOAT:
        value = add("Cast", value, to=old.dtype.value)
    value.type, value.shape = old.type, old.shape
    graph.insert_before(node, tape)
    return value


def _mask_merged_heads(graph: ir.Graph, node: ir.Node) -> bool:
    """``merge(where(row, number, split(x)))`` is ``where(row, number, x)`` with x [B, S, heads * size]."""
    import onnx_ir as ir

    row, number, heads = node.inputs
    split = _made_by(heads, "Reshape")
    users = [user for user, _ in node.outputs[0].uses()]
    if split is None or row is None or _number(number) is None or node.outputs[0].is_graph_output():
        return False
    source = split.inputs[0]
    if source is None or source.shape is None or row.shape is None or len(source.shape) != 3:
        return False
    if [str(d) for d in row.shape] != [*(str(d) for d in source.shape[:2]), "1", "1"]:
        return False
    if not users or not all(u.op_type == "Reshape" and _same_shape(u.outputs[0], source) for u in users):
        return False
    if any(u.outputs[0].is_graph_output() for u in users):
        return False
    flat = next((u for u, _ in row.uses() if u.op_type == "Squeeze" and _last_axis(u)), None)
    made: list[ir.Node] = []
    if flat is None:
        flat = ir.node("Squeeze", [row, _constant(graph, "mask.axis.3", [3])])
        flat.outputs[0].type, flat.outputs[0].shape = row.type, ir.Shape(row.shape[:3])
        made.append(flat)
    masked = ir.node("Where", [flat.outputs[0], number, source])
    masked.outputs[0].type, masked.outputs[0].shape = source.type, source.shape
    graph.insert_before(node, [*made, masked])
    for user in users:
        user.outputs[0].replace_all_uses_with(masked.outputs[0])
    return True


def _last_axis(node: ir.Node) -> bool:
    return len(node.inputs) > 1 and _number(node.inputs[1]) == 3
