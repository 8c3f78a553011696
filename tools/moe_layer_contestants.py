"""Who computes a MoE layer: each contestant takes the same inputs and returns the layer's output."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from moe_layer import Array, Inputs, Layer, save_model

from moe_export.backends.onnxruntime.plugin import cpu_plugin_path, cpu_plugin_problem

COPY_LIMIT = 6 * 2**30
"""Bytes of weights that ``batched_mm`` may copy per call: more takes seconds, and memory."""
MODEL_LIMIT = 4 * 2**30
"""Bytes of float32 weights up to which float32-only contestants get a copy of a bfloat16 layer's weights."""

Run = Callable[[], Any]


class LeftOut(Exception):
    """Why a contestant does not take part."""


class Contestants:
    """Makes contestants for one layer; models and modules are made once and kept.

    ``folder`` takes the ONNX models; ``threads`` is what every contestant may use.
    """

    def __init__(self, layer: Layer, threads: int, folder: Path) -> None:
        self.layer = layer
        self.threads = threads
        self.folder = folder
        self._sessions: dict[str, Any] = {}
        self._block: Any = None
        self._compiled: Any = None
        self._openvino: Any = None

    def make(self, name: str, inputs: Inputs) -> Run:
        """A function that computes the layer on ``inputs`` once.

        Raises:
            LeftOut: it cannot take part here; the text says why.
        """
        makers: dict[str, Callable[[Inputs], Run]] = {
            "eager": lambda i: self._transformers("eager", i),
            "grouped_mm": lambda i: self._transformers("grouped_mm", i),
            "batched_mm": self._batched,
            "torch.compile": self._compile,
            "dense": self._dense,
            "onnxruntime-moe": lambda i: self._session("contrib", i),
            "expert-loop": lambda i: self._session("loop", i),
            "openvino": self._run_openvino,
            "ggml": self._ggml,
            "plugin-packed": lambda i: self._session("packed", i),
            "plugin-unpacked": lambda i: self._session("unpacked", i),
        }
        return makers[name](inputs)

    # PyTorch

    def _torch_inputs(self, inputs: Inputs) -> tuple[Any, Any]:
        import torch

        dtype = torch.bfloat16 if self.layer.dtype == "bfloat16" else torch.float32
        return torch.from_numpy(inputs.hidden).to(dtype), torch.from_numpy(inputs.logits)

    def _experts(self) -> Any:
        """transformers' MixtralExperts over the layer's weights (no copy)."""
        if self._block is None:
            import torch
            from transformers.models.mixtral.configuration_mixtral import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralExperts

            s = self.layer.shape
            config = MixtralConfig(
                hidden_size=s.hidden,
                intermediate_size=s.intermediate,
                num_local_experts=s.experts,
                num_experts_per_tok=s.top_k,
            )
            with torch.device("meta"):
                block = MixtralExperts(config)
            block.gate_up_proj = torch.nn.Parameter(self._tensor(self.layer.up), requires_grad=False)
            block.down_proj = torch.nn.Parameter(self._tensor(self.layer.down), requires_grad=False)
            self._block = block
        return self._block

    def _tensor(self, array: Array) -> Any:
        import torch

        if self.layer.dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def _transformers(self, implementation: str, inputs: Inputs) -> Run:
        import torch

        experts = self._experts()
        hidden, logits = self._torch_inputs(inputs)

        def run() -> Any:
            experts.config._experts_implementation = implementation
            with torch.inference_mode():
                return _layer(experts, hidden, logits, self.layer.shape.top_k)

        return run

    def _batched(self, inputs: Inputs) -> Run:
        copied = inputs.ids.size * self.layer.shape.expert_bytes(self.layer.itemsize)
        if copied > COPY_LIMIT:
            raise LeftOut(f"copies {copied / 2**30:.0f} GiB of weights per call")
        return self._transformers("batched_mm", inputs)

    def _compile(self, inputs: Inputs) -> Run:
        import torch

        experts = self._experts()
        hidden, logits = self._torch_inputs(inputs)
        if self._compiled is None:
            self._compiled = torch.compile(_layer, dynamic=False)
        compiled = self._compiled

        def run() -> Any:
            experts.config._experts_implementation = "grouped_mm"
            with torch.inference_mode():
                return compiled(experts, hidden, logits, self.layer.shape.top_k)

        return run

    def _dense(self, inputs: Inputs) -> Run:
        """One-hot routing without any routing: K dense feed-forward networks over all tokens."""
        import torch
        from torch.nn import functional

        chosen = np.unique(inputs.ids)
        if len(chosen) != self.layer.shape.top_k:
            raise LeftOut("needs one-hot routing")
        hidden, logits = self._torch_inputs(inputs)
        up, down = self._tensor(self.layer.up), self._tensor(self.layer.down)

        def run() -> Any:
            with torch.inference_mode():
                weights = torch.softmax(logits[:, chosen], dim=-1).to(hidden.dtype)
                out = torch.zeros_like(hidden)
                for k, expert in enumerate(chosen):
                    gate, linear = functional.linear(hidden, up[expert]).chunk(2, dim=-1)
                    y = functional.linear(functional.silu(gate) * linear, down[expert])
                    out += weights[:, k : k + 1] * y
                return out

        return run

    # ONNX Runtime

    def _session(self, form: str, inputs: Inputs) -> Run:
        import onnxruntime as ort

        plugin = form in ("packed", "unpacked")
        if form not in self._sessions:
            if plugin and cpu_plugin_path() is None:
                raise LeftOut(cpu_plugin_problem())
            if not plugin and self.layer.dtype != "float32":
                raise LeftOut(f"has no {self.layer.dtype} kernel")
            path = self.folder / form / "model.onnx"
            path.parent.mkdir()
            save_model(self.layer, form, path)
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = self.threads
            if plugin:
                options.register_custom_ops_library(str(cpu_plugin_path()))
                # The weights stay where they are: memory-mapped.
                options.add_session_config_entry("session.disable_prepacking", "1")
            self._sessions[form] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session = self._sessions[form]
        feed = {"hidden": inputs.hidden, "logits": inputs.logits}
        return lambda: session.run(None, feed)[0]

    # Optional

    def _run_openvino(self, inputs: Inputs) -> Run:
        if importlib.util.find_spec("openvino") is None:
            raise LeftOut("the package openvino is not installed (pip install openvino)")
        if self.layer.dtype != "float32":
            raise LeftOut("measured in float32 only")
        openvino = importlib.import_module("openvino")
        if self._openvino is None:
            path = self.folder / "openvino" / "model.onnx"
            path.parent.mkdir()
            save_model(self.layer, "loop", path)
            _inline(path)
            core = openvino.Core()
            options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(self.threads)}
            self._openvino = core.compile_model(str(path), "CPU", options)
        request = self._openvino.create_infer_request()
        feed = {"hidden": inputs.hidden, "logits": inputs.logits}
        return lambda: request.infer(feed)[0]

    def _ggml(self, _inputs: Inputs) -> Run:
        raise LeftOut("no Python package brings its mul_mat_id; build llama.cpp to compare")


def _layer(experts: Any, hidden: Any, logits: Any, top_k: int) -> Any:
    """transformers' MixtralSparseMoeBlock from the logits on."""
    import torch

    probabilities = torch.softmax(logits.float(), dim=-1)
    weights, ids = torch.topk(probabilities, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts(hidden, ids, weights)


def _inline(path: Path) -> None:
    """Replace calls of functions by their bodies, for runtimes that know none."""
    import onnx
    import onnx.inliner

    model = onnx.load(path, load_external_data=False)
    onnx.save(onnx.inliner.inline_local_functions(model), path)


ALL = (
    "eager",
    "grouped_mm",
    "batched_mm",
    "torch.compile",
    "onnxruntime-moe",
    "expert-loop",
    "openvino",
    "ggml",
    "plugin-packed",
    "plugin-unpacked",
)
"""In the order of the table. ``dense`` joins them where the routing is one-hot."""


def is_plugin(name: str) -> bool:
    return name.startswith("plugin-")


def as_array(result: Any) -> Array:
    """A contestant's result as float64."""
    if isinstance(result, np.ndarray):
        return result.astype(np.float64)
    return np.asarray(result.to("cpu").double().numpy())
