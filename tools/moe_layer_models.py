"""A layer to measure as ONNX models: one form per way that ONNX Runtime or OpenVINO computes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from moe_layer import Array, Layer

from moe_export.graph.functions import attach_functions
from moe_export.ops import DOMAIN, VERSION
from moe_export.ops.packing import pack_down, pack_up
from moe_export.ops.quantization import Quantized, interleave
from moe_export.ops.quantized_packing import pack_quantized_down, pack_quantized_up
from moe_export.passes.qmoe import (
    INT8_ACTIVATIONS,
    MICROSOFT,
    QuantizedExperts,
    activation_attributes,
    qmoe_nodes,
)
from moe_export.passes.unrolled_matmul import Unroller

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 22
KERNELS_ONLY = ("packed", "unpacked", "plugin-int8", "plugin-int4")
"""Forms that are saved without the bodies of their functions: only the plugin's kernels can run them."""


def save_model(layer: Layer, form: str, path: Path) -> None:
    """Write the layer as an ONNX model (``hidden``, ``logits`` → ``out``), weights in a file beside it.

    ``form``: ``packed`` or ``unpacked`` (one ExpertMLP), ``loop`` (a MatMul per expert, as engines without
    the plugin have it), ``contrib`` (ONNX Runtime's com.microsoft.MoE), ``qmoe-int8`` and ``qmoe-int4`` (its
    QMoE, as ``--quantize`` builds it), ``plugin-int8`` and ``plugin-int4`` (one QuantizedExpertMLP).
    """
    import onnx_ir as ir

    builder = _Builder(layer)
    forms: dict[str, Callable[[], None]] = {
        "packed": lambda: builder.expert_mlp(pack_up(layer.up), pack_down(layer.down), packed=1),
        "unpacked": lambda: builder.expert_mlp(layer.up, layer.down, packed=0),
        "loop": builder.loop,
        "contrib": builder.contrib,
        **{f"qmoe-{kind}": partial(builder.qmoe, kind) for kind in ("int8", "int4")},
        **{f"plugin-{kind}": partial(builder.quantized, kind) for kind in ("int8", "int4")},
    }
    forms[form]()
    model = builder.finish(bodies=form not in KERNELS_ONLY)
    ir.save(model, path, external_data=path.name + ".data")


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

    def quantized(self, kind: str) -> None:
        weights, ids = self._route()
        up, down = self.layer.quantized(kind)
        packed = (pack_quantized_up(up), pack_quantized_down(down))
        inputs = [self.hidden, ids, weights]
        for name, matrix in zip(("up", "down"), packed, strict=True):
            inputs += [
                self._weight(f"{name}_codes", matrix.codes),
                self._weight(f"{name}_scales", matrix.scales),
            ]
        attributes = {"num_experts": self.layer.shape.experts, "bits": up.bits, "block": up.block}
        (self.out,) = self._add("QuantizedExpertMLP", inputs, DOMAIN, **attributes)

    def qmoe(self, kind: str) -> None:
        weights, ids = self._route()
        up, down = self.layer.quantized(kind)
        pairs = Quantized(
            interleave(up.codes, "concatenated"), interleave(up.scales, "concatenated"), up.bits, up.block
        )
        activation = activation_attributes({"activation": "silu", "gated": 1})
        if isinstance(activation, str):
            raise ValueError(activation)
        nodes = qmoe_nodes(
            self.hidden,
            ids,
            weights,
            QuantizedExperts(pairs, down, None, None),
            activation,
            top_k=self.layer.shape.top_k,
            accuracy_level=INT8_ACTIVATIONS,
            constant=self._weight,
        )
        self.nodes += nodes
        self.domains[MICROSOFT] = VERSION
        self.out = nodes[-1].outputs[0]

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

    def finish(self, bodies: bool) -> ir.Model:
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
        if bodies:
            attach_functions(model, OPSET)
        return model
