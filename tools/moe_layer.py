"""One MoE layer to measure: shapes, weights, routings that are forced through router logits, its reference,
and its ONNX models.

A layer here is everything from router logits on: softmax, top k, renormalise, expert MLPs (SwiGLU), weighted
sum. The router's matrix is left out, so that a routing can be forced by the logits alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_export.bench.routing import forced_routing
from moe_export.graph.functions import attach_functions
from moe_export.ops import DOMAIN, OPS, VERSION
from moe_export.ops.packing import pack_down, pack_up
from moe_export.passes.unrolled_matmul import Unroller
from moe_export.schema import MoELayer

if TYPE_CHECKING:
    import onnx_ir as ir

Array = NDArray[Any]

OPSET = 22
CHECKED_TOKENS = 48
"""Tokens whose output is compared with the reference: spread over all of them, first and last included."""


@dataclass(frozen=True)
class Shape:
    """H hidden size, I intermediate size, E experts, K experts per token."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def expert_bytes(self, itemsize: int) -> int:
        """Bytes of one expert's three matrices."""
        return 3 * self.hidden * self.intermediate * itemsize

    def flops(self, assignments: int) -> int:
        """Additions and multiplications of the matrices for that many rows."""
        return 2 * 3 * self.hidden * self.intermediate * assignments


SHAPES = {
    s.name: s
    for s in (
        Shape("A", 1024, 2816, 16, 2),
        Shape("B", 1024, 512, 64, 8),
        Shape("C", 4096, 14336, 8, 2),  # Mixtral 8x7B's layer
        Shape("tiny", 64, 96, 4, 2),  # to try the program
    )
}


@dataclass(frozen=True)
class Inputs:
    """What all contestants get, and what the checked tokens must give."""

    hidden: Array  # float32 [T, H]
    logits: Array  # float32 [T, E]
    ids: Array  # int32 [T, K], what the logits choose
    checked: Array  # int64 [C], token numbers
    expected: Array  # float64 [C, H]

    @property
    def active(self) -> int:
        """Experts that some token chose."""
        return len(np.unique(self.ids))


class Layer:
    """Weights of one shape in one element type. ``up`` [E, 2I, H], gate rows first; ``down`` [E, H, I]."""

    def __init__(self, shape: Shape, dtype: str, seed: int = 0) -> None:
        import ml_dtypes

        self.shape = shape
        self.dtype = dtype
        self.numpy_dtype: Any = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
        rng = np.random.default_rng(seed)
        h, i, e = shape.hidden, shape.intermediate, shape.experts
        self.up = np.empty((e, 2 * i, h), self.numpy_dtype)
        self.down = np.empty((e, h, i), self.numpy_dtype)
        for index in range(e):
            self.up[index] = rng.standard_normal((2 * i, h), np.float32) / np.float32(h**0.5)
            self.down[index] = rng.standard_normal((h, i), np.float32) / np.float32(i**0.5)

    @property
    def itemsize(self) -> int:
        return int(self.numpy_dtype.itemsize)

    @cached_property
    def packed(self) -> tuple[Array, Array]:
        return pack_up(self.up), pack_down(self.down)

    def inputs(self, tokens: int, routing: str, seed: int = 0) -> Inputs:
        """Random tokens, and logits that choose the experts of ``routing`` (uniform, zipf, one-hot)."""
        rng = np.random.default_rng([seed, tokens])
        s = self.shape
        names = ("hidden", "ids", "weights", "out")
        described = MoELayer(0, "layer", s.experts, s.top_k, s.hidden, s.intermediate, *names)
        ids, _ = forced_routing(routing, described, tokens, seed)
        hidden = (
            rng.standard_normal((tokens, s.hidden), np.float32).astype(self.numpy_dtype).astype(np.float32)
        )
        logits = rng.uniform(-9.0, -8.0, (tokens, s.experts)).astype(np.float32)
        # Falling from 1.5 in steps far above rounding, so that every contestant chooses alike.
        chosen = 1.5 - 0.25 * np.arange(s.top_k) - 0.1 * rng.random((tokens, s.top_k))
        np.put_along_axis(logits, ids.astype(np.int64), chosen.astype(np.float32), axis=1)
        checked = np.unique(np.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS)).astype(np.int64))
        expected = self.reference(hidden[checked], logits[checked])
        return Inputs(hidden, logits, ids, checked, expected)

    def reference(self, hidden: Array, logits: Array) -> Array:
        """The contracts' float64 references, one expert at a time."""
        weights, ids = OPS["Router"].reference(logits, top_k=self.shape.top_k, renormalize=1)
        out = np.zeros(hidden.shape, np.float64)
        for expert in np.unique(ids):
            mine = np.where(ids == expert, 0, -1).astype(np.int32)
            up, down = self.up[expert : expert + 1], self.down[expert : expert + 1]
            out += OPS["ExpertMLP"].reference(hidden, mine, weights, up, down, num_experts=1)
        return out


def save_model(layer: Layer, form: str, path: Path) -> None:
    """Write the layer as an ONNX model (``hidden``, ``logits`` → ``out``), weights in a file beside it.

    ``form``: ``packed`` or ``unpacked`` (one ExpertMLP), ``loop`` (a MatMul per expert, as engines without
    the plugin have it), ``contrib`` (ONNX Runtime's com.microsoft.MoE).
    """
    import onnx_ir as ir

    builder = _Builder(layer)
    {
        "packed": lambda: builder.expert_mlp(*layer.packed, packed=1),
        "unpacked": lambda: builder.expert_mlp(layer.up, layer.down, packed=0),
        "loop": builder.loop,
        "contrib": builder.contrib,
    }[form]()
    ir.save(builder.finish(), path, external_data=path.name + ".data")


class _Builder:
    """A graph from hidden and logits to out."""

    def __init__(self, layer: Layer) -> None:
        s = layer.shape
        self.layer = layer
        self.hidden = self._value("hidden", ["tokens", s.hidden])
        self.logits = self._value("logits", ["tokens", s.experts])
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.grouped: list[ir.Node] = []
        self.domains = {"": OPSET}

    def _value(self, name: str, shape: list[str | int]) -> ir.Value:
        import onnx_ir as ir

        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    def _weight(self, name: str, array: Array) -> ir.Value:
        import onnx_ir as ir

        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
        )
        self.initializers.append(value)
        return value

    def _add(
        self, op: str, inputs: list[Any], domain: str = "", outputs: int = 1, **attributes: Any
    ) -> list[Any]:
        import onnx_ir as ir

        node = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        if domain:
            self.domains[domain] = VERSION
        return list(node.outputs)

    def _route(self) -> tuple[Any, Any]:
        weights, ids = self._add(
            "Router", [self.logits], DOMAIN, 2, top_k=self.layer.shape.top_k, renormalize=1
        )
        return weights, ids

    def expert_mlp(self, up: Array, down: Array, packed: int) -> None:
        weights, ids = self._route()
        inputs = [self.hidden, ids, weights, self._weight("up", up), self._weight("down", down)]
        experts = self.layer.shape.experts
        (self.out,) = self._add("ExpertMLP", inputs, DOMAIN, num_experts=experts, packed=packed)

    def loop(self) -> None:
        weights, ids = self._route()
        experts = self.layer.shape.experts
        order, offsets, tokens = self._add("Dispatch", [ids], DOMAIN, 3, num_experts=experts, drops=0)
        (rows,) = self._add("Gather", [self.hidden, tokens], axis=0)
        (inner,) = self._grouped(rows, self._weight("up", self.layer.up), offsets)
        gate, up = self._add("Split", [inner], outputs=2, axis=1, num_outputs=2)
        (sigmoid,) = self._add("Sigmoid", [gate])
        (silu,) = self._add("Mul", [gate, sigmoid])
        (activated,) = self._add("Mul", [silu, up])
        (outer,) = self._grouped(activated, self._weight("down", self.layer.down), offsets)
        (self.out,) = self._add("Combine", [outer, order, weights], DOMAIN)

    def _grouped(self, rows: Any, weight: Any, offsets: Any) -> list[Any]:
        outputs = self._add("GroupedMatMul", [rows, weight, offsets], DOMAIN, transposed=0)
        self.grouped.append(self.nodes[-1])
        return outputs

    def contrib(self) -> None:
        s = self.layer.shape
        # swiglu_fusion 1: rows gate 0, up 0, gate 1, ...
        up = self.layer.up.reshape(s.experts, 2, s.intermediate, s.hidden).swapaxes(1, 2)
        first = self._weight("up", np.ascontiguousarray(up).reshape(s.experts, 2 * s.intermediate, s.hidden))
        inputs = [self.hidden, self.logits, first, None, self._weight("down", self.layer.down)]
        (self.out,) = self._add(
            "MoE",
            inputs,
            "com.microsoft",
            k=s.top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
        )

    def finish(self) -> ir.Model:
        import onnx_ir as ir

        self.out.name, self.out.type, self.out.shape = "out", self.hidden.type, self.hidden.shape
        graph = ir.Graph(
            [self.hidden, self.logits],
            [self.out],
            nodes=self.nodes,
            initializers=self.initializers,
            name="moe_layer",
            opset_imports=self.domains,
        )
        model = ir.Model(graph, ir_version=10)
        unroller = Unroller(graph)
        for node in self.grouped:
            unroller.unroll(node, drops=False)
        for name in [n for n, v in graph.initializers.items() if not v.uses()]:
            del graph.initializers[name]
        attach_functions(model, OPSET)
        return model
