"""OpenVINO as a contestant, in the better of two forms.

``fused``: the block over all experts (rows tiled over the experts, three batched products, routing weights
scattered over the experts) that its CPU plugin turns into gathered products of the chosen experts only.
``loop``: the ONNX model with a MatMul per expert, its functions inlined. Fewer tokens favour the first, more
the second; whichever is faster on the inputs at hand takes part.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
from moe_layer import Array, Inputs, Layer, LeftOut, Run, need_memory
from moe_layer_models import save_model

LONG_SECONDS = 1.0
"""A form's trial calls end after so long."""


class OpenVino:
    """Compiled models, one per form and number of threads, made once and kept; ``folder`` takes the ONNX."""

    names: tuple[str, ...] = ("openvino",)

    def __init__(self, layer: Layer, folder: Path) -> None:
        self.layer = layer
        self.folder = folder
        self._requests: dict[tuple[str, int], Any] = {}
        self.note = ""
        """Which form the last contestant has."""

    def make(self, name: str, inputs: Inputs, threads: int) -> Run:
        if importlib.util.find_spec("openvino") is None:
            raise LeftOut('the package openvino is not installed: pip install "moe-export[bench]"')
        runs = {"fused": self._fused(inputs, threads)}
        try:
            runs["loop"] = self._loop(inputs, threads)
        except LeftOut as reason:
            self.note = f"fused form; no loop: {reason}"
            return runs["fused"]
        seconds = {form: _seconds(run) for form, run in runs.items()}
        best = min(seconds, key=lambda form: seconds[form])
        self.note = ", ".join(f"{form} {1e3 * s:.1f} ms" for form, s in seconds.items()) + f": {best} form"
        return runs[best]

    def _fused(self, inputs: Inputs, threads: int) -> Run:
        key = ("fused", threads)
        if key not in self._requests:
            # The gate and up matrices are joined, and all are rearranged, beside the original.
            need_memory("its model", 3 * self.layer.nbytes)
            compiled = self._compile(_fused_model(self.layer), threads)
            kinds = {str(n.get_rt_info()["layerType"].astype(str)) for n in _nodes(compiled)}
            if "GatherMatmul" not in kinds:
                raise RuntimeError(f"OpenVINO did not fuse the experts: its kernels are {sorted(kinds)}")
            self._requests[key] = compiled.create_infer_request()
        request = self._requests[key]
        hidden, logits = inputs.hidden[None], inputs.logits
        return lambda: request.infer([hidden, logits])[0][0]

    def _loop(self, inputs: Inputs, threads: int) -> Run:
        if self.layer.dtype != "float32":
            raise LeftOut("measured in float32 only")
        key = ("loop", threads)
        if key not in self._requests:
            need_memory("its model", 3 * self.layer.nbytes)
            path = self.folder / "openvino" / "model.onnx"
            if not path.exists():
                path.parent.mkdir()
                save_model(self.layer, "loop", path)
                _inline(path)
            self._requests[key] = self._compile(str(path), threads).create_infer_request()
        request = self._requests[key]
        feed = {"hidden": inputs.hidden, "logits": inputs.logits}
        return lambda: request.infer(feed)[0]

    def _compile(self, model: Any, threads: int) -> Any:
        openvino = importlib.import_module("openvino")
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.layer.dtype == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": str(threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return openvino.Core().compile_model(model, "CPU", options)


def _nodes(compiled: Any) -> list[Any]:
    return list(compiled.get_runtime_model().get_ops())


def _seconds(run: Run) -> float:
    """The fastest of three calls; of one, where that is long."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < LONG_SECONDS:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def _fused_model(layer: Layer) -> Any:
    """``hidden`` [1, T, H] and ``logits`` [T, E] → [1, T, H]."""
    openvino = importlib.import_module("openvino")
    op = importlib.import_module("openvino.opset13")
    s = layer.shape
    kind = openvino.Type.f32

    def whole(*values: int) -> Any:
        return op.constant(np.array(values, np.int64))

    def weight(array: Array) -> Any:
        if layer.dtype == "float32":
            return op.constant(np.ascontiguousarray(array), shared_memory=True)
        tensor = openvino.Tensor(openvino.Type.bf16, openvino.Shape(array.shape))
        tensor.data[...] = array.view(tensor.data.dtype)
        return op.convert(op.constant(tensor), kind)

    hidden = op.parameter([-1, -1, s.hidden], kind, name="hidden")
    logits = op.parameter([-1, s.experts], kind, name="logits")
    probabilities = op.softmax(logits, 1)
    best = op.topk(probabilities, op.constant(np.int64(s.top_k)), 1, "max", "value", index_element_type="i64")
    shares = op.divide(best.output(0), op.reduce_sum(best.output(0), whole(1), True))
    nothing = op.broadcast(op.constant(np.float32(0)), op.shape_of(probabilities, "i64"))
    routing = op.scatter_elements_update(nothing, best.output(1), shares, op.constant(np.int64(1)))
    batch = op.gather(op.shape_of(hidden, "i64"), whole(0), op.constant(np.int64(0)))
    by_expert = op.reshape(
        op.transpose(routing, whole(1, 0)), op.concat([whole(s.experts), batch, whole(-1)], 0), False
    )
    rows = op.tile(op.reshape(hidden, whole(-1, s.hidden), False), whole(s.experts, 1))
    rows = op.reshape(rows, whole(s.experts, -1, s.hidden), False)
    gate = op.matmul(rows, weight(layer.up[:, : s.intermediate]), False, True)
    up = op.matmul(rows, weight(layer.up[:, s.intermediate :]), False, True)
    swish = op.swish(gate)
    # With the factor 1 as a second input, as the Python API makes it, OpenVINO does not know the block.
    swish.set_arguments([gate.output(0)])
    swish.validate_and_infer_types()
    down = op.matmul(op.multiply(swish, up), weight(layer.down), False, True)
    shape = op.concat([whole(s.experts), batch, whole(-1, s.hidden)], 0)
    weighted = op.multiply(op.reshape(down, shape, False), op.unsqueeze(by_expert, whole(3)))
    out = op.reduce_sum(weighted, whole(0), False)
    return openvino.Model([op.result(out)], [hidden, logits], "moe_layer")


def _inline(path: Path) -> None:
    """Replace calls of functions by their bodies: OpenVINO knows none."""
    import onnx
    import onnx.inliner

    model = onnx.load(path, load_external_data=False)
    onnx.save(onnx.inliner.inline_local_functions(model), path)
