"""A layer's experts as one ``TRT_MoE`` node: TensorRT's own MoE layer (``IMoELayer``). *Not run on a GPU, and
no plan with it was built*: the layer needs SM100, SM103 or SM110.

The node's contract is that of NVIDIA's pages "MoE (Mixture of Experts)"
(docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-moe.html and
.../_static/operators/MoE.html) and of the ONNX parser of TensorRT-RTX 1.7, which imports the node on any
machine (a test holds the node to it). B sequences of S tokens, K experts per token, T one float dtype:

=====  ==============  ===========================
input  shape           what
=====  ==============  ===========================
0      [B, S, H]       tokens, T
1      [B, S, K]       expert ids, int32 or int64
2      [B, S, K]       routing weights, T
3, 4   [E, H, I]       gate and up matrices, T
5      [E, I, H]       down matrices, T
=====  ==============  ===========================

Output [B, S, H], T. ``activation_type``: 1 is SiLU. Inputs 6 to 8 would be biases, 9 a scale of quantised
activations; ``swiglu_limit``, ``swiglu_alpha`` and ``swiglu_beta`` are documented as not supported yet. None
of these is written. The parser finds the importer by the node's name in any domain, before a function of the
model; the function is what other runtimes execute.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..costs.moe_kernels import TRT_MOE_SMS
from .native_text import ONNX_CODE, NativeForm

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

LOWERING = "trt_moe"
OP, DOMAIN = "TRT_MoE", "trt"
SILU = 1
DTYPES = ("float16", "bfloat16")


def problem(form: NativeForm, sms: Iterable[int]) -> str:
    """Why the layer cannot be a TRT_MoE node of engines for ``sms``; empty: it can."""
    wrong = machine_problem(sms)
    if wrong:
        return wrong
    given = form.attributes
    if given["activation"] != "silu" or not given["gated"]:
        gate = "gated" if given["gated"] else "ungated"
        return f"TensorRT's MoE layer has SiLU-gated experts; these are {gate}, {given['activation']}"
    if given["biased"]:
        return "TRT_MoE is written for experts without biases, and these have them"
    wrong = dtype_problem(form.computed)
    if wrong:
        return wrong
    if form.drops:
        return (
            "its routing may drop assignments, and no source says what TensorRT's MoE layer does with those"
        )
    return ""


def machine_problem(sms: Iterable[int]) -> str:
    """Why engines for ``sms`` have no such layer; empty: all have it."""
    known = tuple(sms)
    other = [sm for sm in known if sm not in TRT_MOE_SMS]
    if known and not other:
        return ""
    had = f", not on SM{other[0]}" if other else ", and no SM was named"
    return f"TensorRT's MoE layer exists on SM100, SM103 and SM110{had}"


def dtype_problem(computed: str) -> str:
    """Why products in ``computed`` are none for the layer; empty: they are."""
    if computed in DTYPES:
        return ""
    return f"TRT_MoE is written for {' and '.join(DTYPES)}, and products here are {computed}"


def body(opset: int) -> onnx.FunctionProto:
    """What the node computes, for runtimes without the layer: every expert on every token, in float32.

    The routing weights, what the down product reads and the result are of dtype T, as in the layer.
    """
    import onnx.parser

    made = onnx.parser.parse_function(
        f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
        {OP} <activation_type> (tokens, ids, scores, gate, up, down) => (out)
        {{
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            first = Constant <value_ints = [0]> ()
            second = Constant <value_ints = [1]> ()
            third = Constant <value_ints = [2]> ()
            last = Constant <value_ints = [-1]> ()
            nothing = Constant <value_float = 0.0> ()
            x = Cast <to = 1> (tokens)
            rows = Unsqueeze (x, second)
            gates = Cast <to = 1> (gate)
            ups = Cast <to = 1> (up)
            downs = Cast <to = 1> (down)
            gated = MatMul (rows, gates)
            linear = MatMul (rows, ups)
            opened = Sigmoid (gated)
            bent = Mul (gated, opened)
            active = Mul (bent, linear)
            stored = CastLike (active, tokens)
            read = Cast <to = 1> (stored)
            each = MatMul (read, downs)
            experts_1d = Shape <start = 0, end = 1> (gate)
            experts = Squeeze (experts_1d, first)
            numbers = Range (zero, experts, one)
            wide = Cast <to = 7> (ids)
            column = Unsqueeze (wide, last)
            hit = Equal (column, numbers)
            score = Cast <to = 1> (scores)
            score_column = Unsqueeze (score, last)
            spread = Where (hit, score_column, nothing)
            share_by_token = ReduceSum <keepdims = 0> (spread, third)
            hit_int = Cast <to = 7> (hit)
            hits = ReduceSum <keepdims = 0> (hit_int, third)
            chosen_by_token = Greater (hits, zero)
            share_rows = Transpose <perm = [0, 2, 1]> (share_by_token)
            chosen_rows = Transpose <perm = [0, 2, 1]> (chosen_by_token)
            share = Unsqueeze (share_rows, last)
            chosen = Unsqueeze (chosen_rows, last)
            present = Where (chosen, each, nothing)
            weighted = Mul (present, share)
            sum = ReduceSum <keepdims = 0> (weighted, second)
            out = CastLike (sum, tokens)
        }}"""
    )
    return made


def trt_moe_nodes(
    model: ir.Model,
    form: NativeForm,
    rows: tuple[ir.Value, ir.Value, ir.Value],
    weights: tuple[ir.Value, ir.Value],
    name: str,
    opset: int,
) -> list[ir.Node]:
    """Nodes for one layer, the last of which gives [T, H] in ``form.dtype``; all tokens are one sequence.

    ``rows``: hidden [T, H], ids [T, K], weights [T, K]. ``weights``: up and down, constants; the model gets
    the layer's three matrices beside them, read when they are written. The op's function goes into ``model``.
    """
    import onnx_ir as ir

    kind = ir.DataType(ONNX_CODE[form.computed])
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(
            op, inputs, attributes=attributes or None, domain=domain, name=f"{name}/{len(nodes)}.{op}"
        )
        nodes.append(node)
        return node.outputs[0]

    axis = ir.Value(name=f"{name}.axis", const_value=ir.tensor([0], dtype=ir.DataType.INT64))
    axis.dtype, axis.shape = ir.DataType.INT64, ir.Shape([1])
    model.graph.register_initializer(axis)
    hidden, ids, shares = rows
    batched = [
        add("Unsqueeze", [value, axis])
        for value in (add("Cast", [hidden], to=kind.value), ids, add("Cast", [shares], to=kind.value))
    ]
    matrices = _matrices(model.graph, form, weights, name, kind)
    out = add(OP, [*batched, *matrices], DOMAIN, activation_type=SILU)
    out.dtype, out.shape = kind, ir.Shape([1, None, form.hidden])
    flat = add("Squeeze", [out, axis])
    add("Cast", [flat], to=ONNX_CODE[form.dtype])
    function = ir.from_proto(body(opset))
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = 1
    return nodes


def count(model: ir.Model) -> int:
    """TRT_MoE nodes of a model."""
    return sum((n.domain, n.op_type) == (DOMAIN, OP) for n in model.graph.all_nodes())


def _matrices(
    graph: ir.Graph, form: NativeForm, weights: tuple[ir.Value, ir.Value], name: str, kind: ir.DataType
) -> list[ir.Value]:
    """Gate and up [E, H, I] and down [E, I, H] as new initializers."""
    import numpy as np
    import onnx_ir as ir

    up, down = (weight.const_value for weight in weights)
    if up is None or down is None:
        raise ValueError(f"{name}: its matrices are no constants")
    transposed = bool(form.attributes["transposed"])
    interleaved = form.attributes["layout"] == "interleaved"

    def half(tensor: ir.TensorProtocol, which: int) -> NDArray[Any]:
        array = tensor.numpy()
        by_column = array if transposed else array.swapaxes(1, 2)
        begin = which * form.inner
        return by_column[:, :, which::2] if interleaved else by_column[:, :, begin : begin + form.inner]

    def read(which: int) -> NDArray[Any]:
        if which < 2:
            return half(up, which)
        array = down.numpy()
        return array if transposed else array.swapaxes(1, 2)

    def stored(which: int) -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(read(which).astype(kind.numpy())), dtype=kind)

    made = []
    for which, (part, a, b) in enumerate(
        (
            ("gate", form.hidden, form.inner),
            ("up", form.hidden, form.inner),
            ("down", form.inner, form.hidden),
        )
    ):
        shape = ir.Shape([form.experts, a, b])
        tensor = ir.LazyTensor(partial(stored, which), dtype=kind, shape=shape, name=f"{name}.{part}")
        value = ir.Value(name=f"{name}.{part}", const_value=tensor)
        value.dtype, value.shape = kind, shape
        graph.register_initializer(value)
        made.append(value)
    return made
