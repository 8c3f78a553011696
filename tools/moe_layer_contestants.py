"""Who computes a MoE layer: each contestant takes the same inputs and returns the layer's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from moe_layer import Array, Inputs, Layer, Run
from moe_layer_ggml import Ggml
from moe_layer_onnxruntime import QUANTIZED, OnnxRuntime
from moe_layer_openvino import OpenVino
from moe_layer_torch import Torch

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
    *QUANTIZED,
)
"""In the order of the table. ``dense`` joins them where the routing is one-hot."""
FLOAT = tuple(name for name in ALL if name not in QUANTIZED)

TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (3e-2, 1e-2), "int8": (3e-2, 2e-2), "int4": (0.25, 0.2)}
"""By dtype: the largest error over max(1, largest value of the float64 reference), and the RMS error over the
reference's RMS. The reference always has the unquantised weights; an expert left out is far outside."""


class Kind(Protocol):
    """Contestants of one library, for one layer; models are made once and kept."""

    names: tuple[str, ...]

    def make(self, name: str, inputs: Inputs, threads: int) -> Run:
        """A function that computes the layer on ``inputs`` once, with so many threads.

        Raises:
            LeftOut: it cannot take part here; the text says why.
        """


class Contestants:
    """All contestants of one layer. ``folder`` takes their models, ``ggml`` is where that library lies."""

    def __init__(self, layer: Layer, folder: Path, ggml: str | None = None) -> None:
        self.layer = layer
        self.openvino = OpenVino(layer, folder)
        kinds: tuple[Kind, ...] = (Torch(layer), OnnxRuntime(layer, folder), self.openvino, Ggml(layer, ggml))
        self._kinds = {name: kind for kind in kinds for name in kind.names}

    def make(self, name: str, inputs: Inputs, threads: int) -> Run:
        """See :meth:`Kind.make`."""
        return self._kinds[name].make(name, inputs, threads)


def dtype_of(name: str, layer_dtype: str) -> str:
    """What a contestant's weights are: its layer's, or those it is quantised to."""
    return name.rpartition("-")[2] if name in QUANTIZED else layer_dtype


def is_plugin(name: str) -> bool:
    return name.startswith("plugin-")


def problem(result: Any, inputs: Inputs, dtype: str) -> str:
    """What is wrong with a contestant's result, compared with the reference; empty: nothing."""
    got = as_array(result)
    if got.shape != inputs.hidden.shape:
        return f"shape {got.shape}, expected {inputs.hidden.shape}"
    largest, rms = TOLERANCES[dtype]
    error = got[inputs.checked] - inputs.expected
    limit = largest * max(1.0, float(np.abs(inputs.expected).max()))
    worst = float(np.abs(error).max())
    if not worst <= limit:
        return f"largest error {worst:.3g}, allowed {limit:.3g}"
    relative = float(np.sqrt((error**2).mean() / (inputs.expected**2).mean()))
    return "" if relative <= rms else f"relative RMS error {relative:.3g}, allowed {rms:.3g}"


def as_array(result: Any) -> Array:
    """A contestant's result as float64."""
    if isinstance(result, np.ndarray):
        return result.astype(np.float64)
    return np.asarray(result.to("cpu").double().numpy())
