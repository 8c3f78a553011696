"""Whether the installed ONNX Runtime's QMoE computes a form of experts as it says: run beside the reference.

QMoE's traps are silent (see :mod:`moe_export.passes.qmoe`) and differ between versions, so no form is used
before a small layer of that form was run: weights that do not sum to one, zero weights, dropped and repeated
experts, NaN and negative weights included.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ..ops.expert_mlp import reference
from ..ops.quantization import dequantize
from .qmoe import MICROSOFT, QuantizedExperts, activation_attributes, qmoe_nodes, quantize_experts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXACT = 2e-5
"""Largest error with float32 activations, relative to the largest value: rounding of float32."""
ROUNDED = {"max": 0.05, "rms": 0.02}
"""Errors with int8 activations (blocks of them share a scale): measured 0.008 to 0.02 and below 0.01."""
TOKENS = 12
OPSET = 20


def qmoe_problem(
    attributes: Mapping[str, Any], *, bits: int, block: int, top_k: int, accuracy_level: int
) -> str:
    """Why QMoE cannot run experts of this form (ExpertMLP's attributes); empty when it does."""
    form = {k: attributes[k] for k in ("activation", "gated", "alpha", "limit", "biased")}
    return _problem(tuple(sorted(form.items())), bits, block, top_k, accuracy_level)


@cache
def _problem(form: tuple[tuple[str, Any], ...], bits: int, block: int, top_k: int, accuracy: int) -> str:
    attributes = {**dict(form), "layout": "concatenated", "transposed": 0}
    activation = activation_attributes(attributes)
    if isinstance(activation, str):
        return activation
    # Only 4-bit experts have a kernel with float32 activations, which shows the function exactly.
    for run_bits, level, exact in ((4, 0, True), (bits, accuracy, False)):
        layer = _Layer(attributes, run_bits, block, top_k)
        try:
            got = layer.run(activation, level)
        except Exception as error:  # onnxruntime raises its own unexported exception classes
            return f"ONNX Runtime does not run QMoE of this form: {str(error).splitlines()[0][:200]}"
        if problem := layer.judge(got, exact):
            return f"ONNX Runtime's QMoE of this form gives other numbers: {problem}"
    return ""


class _Layer:
    """A small layer with every routing that QMoE might take otherwise; the last rows must come out NaN."""

    def __init__(self, attributes: Mapping[str, Any], bits: int, block: int, top_k: int) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        self.attributes, self.top_k, self.size = dict(attributes), top_k, 2 * block
        self.experts, wide = top_k + 3, self.size * (2 if attributes["gated"] else 1)
        up = rng.standard_normal((self.experts, wide, self.size)) * 0.3
        down = rng.standard_normal((self.experts, self.size, self.size)) * 0.3
        biases: tuple[Any, Any] = (None, None)
        if attributes["biased"]:
            biases = (rng.standard_normal((self.experts, wide)), rng.standard_normal(up.shape[::2]))
        self.stored = quantize_experts(up, down, *biases, attributes, bits=bits, block=block)
        self.hidden = rng.standard_normal((TOKENS, self.size)).astype(np.float32)
        order = [rng.permutation(self.experts)[:top_k] for _ in range(TOKENS)]
        self.ids = np.asarray(order, np.int32).reshape(TOKENS, top_k)
        self.weights = (rng.random((TOKENS, top_k)) * 3 + 0.1).astype(np.float32)
        self.ids[0] = np.arange(top_k)
        self.weights[1, 0] = 0.0
        self.weights[2] = 0.0
        self.ids[3, 0], self.weights[3, 0] = -1, 0.0
        self.ids[4] = self.ids[4, 0]
        self.ids[5], self.weights[5] = -1, 0.0
        self.weights[8, -1] = np.nan
        self.weights[9, 0] = -0.5
        self.hidden[10, 3] = np.nan
        self.hidden[11, 5] = np.inf
        self.good = 8

    def expected(self) -> NDArray[np.float64]:
        """[T, H] by ExpertMLP's reference on the weights that the codes stand for."""
        stored = self.stored
        return reference(
            self.hidden[: self.good],
            self.ids[: self.good],
            self.weights[: self.good],
            dequantize(stored.up),
            dequantize(stored.down),
            stored.up_bias,
            stored.down_bias,
            num_experts=self.experts,
            **{**self.attributes, "layout": "interleaved"},
        )

    def run(self, activation: Mapping[str, Any], accuracy_level: int) -> NDArray[np.float64]:
        import numpy as np
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        model = qmoe_model(self.stored, activation, self.top_k, accuracy_level)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {"hidden": self.hidden, "expert_ids": self.ids, "weights": self.weights}
        (got,) = session.run(None, feed)
        return np.asarray(got, np.float64)

    def judge(self, got: NDArray[np.float64], exact: bool) -> str:
        import numpy as np

        want = self.expected()
        scale = max(float(np.abs(want).max()), 1e-6)
        error = np.abs(got[: self.good] - want) / scale
        if not np.isfinite(error).all():
            return "values that are not finite"
        limit = EXACT if exact else ROUNDED["max"]
        if float(error.max()) > limit:
            row = int(error.max(axis=1).argmax())
            return f"error {float(error.max()):.2g} with experts {self.ids[row].tolist()}, allowed {limit:g}"
        rms = float(np.sqrt((error**2).mean()))
        if not exact and rms > ROUNDED["rms"]:
            return f"root mean square error {rms:.2g}, allowed {ROUNDED['rms']:g}"
        if not np.isnan(got[self.good :]).all():
            return "NaN, infinite input or negative weights do not show in the output"
        return ""


def qmoe_model(
    experts: QuantizedExperts, activation: Mapping[str, Any], top_k: int, accuracy_level: int
) -> bytes:
    """A model of one layer: ``hidden`` [T, H], ``expert_ids`` int32 [T, K], ``weights`` [T, K] → ``out``."""
    import onnx_ir as ir

    initializers: list[ir.Value] = []

    def constant(name: str, array: Any) -> ir.Value:
        initializers.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return initializers[-1]

    size = experts.down.scales.shape[1]
    kinds = {"hidden": (ir.DataType.FLOAT, size), "weights": (ir.DataType.FLOAT, top_k)}
    kinds["expert_ids"] = (ir.DataType.INT32, top_k)
    values = {
        name: ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(["tokens", width]))
        for name, (kind, width) in kinds.items()
    }
    nodes = qmoe_nodes(
        values["hidden"], values["expert_ids"], values["weights"], experts, activation,
        top_k=top_k, accuracy_level=accuracy_level, constant=constant,
    )  # fmt: skip
    out = nodes[-1].outputs[0]
    out.name, out.type = "out", ir.TensorType(ir.DataType.FLOAT)
    out.shape = ir.Shape(["tokens", size])
    graph = ir.Graph(
        list(values.values()), [out], nodes=nodes, initializers=initializers, name="layer",
        opset_imports={"": OPSET, MICROSOFT: 1},
    )  # fmt: skip
    model: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return model
