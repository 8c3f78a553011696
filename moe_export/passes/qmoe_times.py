"""How fast a layer's quantised experts are here, beside the same layer in float32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..graph.functions import attach_functions
from ..ops import DOMAIN, OPS, VERSION
from .qmoe import INT8_ACTIVATIONS, QuantizedExperts, quantize_experts
from .qmoe_proof import OPSET, qmoe_model

MEASURE_LIMIT = 512 * 2**20
"""Bytes of a layer's float32 weights up to which both forms are timed."""
TOKENS = (1, 64)
ROUNDS = 9


@dataclass(frozen=True)
class Times:
    """Milliseconds by number of tokens (``T=1``), and what follows from them in words."""

    reason: str
    alternative: str
    quantized_ms: dict[str, float] = field(default_factory=dict)
    float_ms: dict[str, float] = field(default_factory=dict)


def compare_times(
    num_experts: int,
    top_k: int,
    attributes: Mapping[str, Any],
    experts: QuantizedExperts,
    activation: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Times:
    """Both forms, run in turns on random tokens; layers of equal form are measured once.

    ``options``: ``cpu_plugin`` is the path of the CPU plugin's library, which runs the float form;
    ``threads``.
    """
    plugin = options.get("cpu_plugin")
    hidden, inner = experts.down.codes.shape[1], experts.down.scales.shape[2] * experts.down.block
    if not plugin:
        return Times("not timed: without the CPU plugin there is no float op to time it against", "larger")
    nbytes = 4 * num_experts * hidden * inner * (3 if attributes["gated"] else 2)
    if nbytes > MEASURE_LIMIT:
        return Times(f"not timed here ({nbytes / 2**20:.0f} MiB as float32)", "larger")
    key = tuple(sorted((k, v) for k, v in attributes.items() if k not in ("layer", "num_experts")))
    size = (num_experts, top_k, hidden, inner)
    float_ms, quantized_ms = _measured(
        _Case(size, key, experts.up.bits, experts.up.block, tuple(sorted(activation.items()))),
        str(plugin),
        options.get("threads"),
    )
    ratios = {t: float_ms[t] / quantized_ms[t] for t in float_ms}
    words = ", ".join(
        f"{r:.2f} times as fast at {t}" if r >= 1 else f"SLOWER at {t} ({1 / r:.2f} times the time)"
        for t, r in ratios.items()
    )
    slower = [t for t, r in ratios.items() if r < 1]
    alternative = (
        f"the CPU plugin's float32 op: faster at {', '.join(slower)}, larger" if slower else "slower"
    )
    return Times(f"against the CPU plugin's float32 op: {words}", alternative, quantized_ms, float_ms)


@dataclass(frozen=True)
class _Case:
    size: tuple[int, int, int, int]
    """E, K, H, I."""
    attributes: tuple[tuple[str, Any], ...]
    bits: int
    block: int
    activation: tuple[tuple[str, Any], ...]


@cache
def _measured(case: _Case, plugin: str, threads: int | None) -> tuple[dict[str, float], dict[str, float]]:
    import numpy as np
    import onnxruntime as ort

    count, top_k, hidden, inner = case.size
    attributes = {**dict(case.attributes), "transposed": 0, "packed": 0, "layout": "concatenated"}
    wide = inner * (2 if attributes["gated"] else 1)
    rng = np.random.default_rng(0)
    up = rng.standard_normal((count, wide, hidden), dtype=np.float32) * 0.02
    down = rng.standard_normal((count, hidden, inner), dtype=np.float32) * 0.02
    up_bias = np.zeros((count, wide), np.float32) if attributes["biased"] else None
    down_bias = np.zeros((count, hidden), np.float32) if attributes["biased"] else None
    stored = quantize_experts(up, down, up_bias, down_bias, attributes, bits=case.bits, block=case.block)
    models = {
        "float": _float_model(case, attributes, (up, down, up_bias, down_bias)),
        "quantized": qmoe_model(stored, dict(case.activation), top_k, INT8_ACTIVATIONS),
    }
    sessions = {}
    for name, model in models.items():
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if threads:
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if name == "float":
            options.register_custom_ops_library(plugin)
        sessions[name] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    out: dict[str, dict[str, float]] = {name: {} for name in sessions}
    for tokens in TOKENS:
        ids = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]).astype(np.int32)
        feed = {"hidden": rng.standard_normal((tokens, hidden), dtype=np.float32), "expert_ids": ids}
        feed["weights"] = np.full(ids.shape, 1 / top_k, np.float32)
        samples: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(ROUNDS):
            for name, session in sessions.items():
                begin = time.perf_counter()
                session.run(None, feed)
                if turn >= 2:
                    samples[name].append((time.perf_counter() - begin) * 1e3)
        for name, values in samples.items():
            out[name][f"T={tokens}"] = round(statistics.median(values), 4)
    return out["float"], out["quantized"]


def _float_model(case: _Case, attributes: Mapping[str, Any], arrays: tuple[Any, ...]) -> bytes:
    """The same layer as one ExpertMLP node with packed weights."""
    import onnx_ir as ir

    from ..ops.packing import pack_down, pack_up

    count, top_k, hidden, _ = case.size
    up, down, up_bias, down_bias = arrays
    stored = {
        "up": pack_up(up, gated=bool(attributes["gated"])),
        "down": pack_down(down),
        "up_bias": up_bias,
        "down_bias": down_bias,
    }
    kinds = {
        "hidden": (ir.DataType.FLOAT, hidden),
        "expert_ids": (ir.DataType.INT32, top_k),
        "weights": (ir.DataType.FLOAT, top_k),
    }
    values = {
        name: ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(["tokens", width]))
        for name, (kind, width) in kinds.items()
    }
    weights = {
        name: ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in stored.items()
        if array is not None
    }
    full = OPS["ExpertMLP"].complete({**attributes, "packed": 1, "num_experts": count})
    node = ir.node("ExpertMLP", [*values.values(), *map(weights.get, stored)], attributes=full, domain=DOMAIN)
    out = node.outputs[0]
    out.name, out.type, out.shape = "out", values["hidden"].type, values["hidden"].shape
    graph = ir.Graph(
        list(values.values()), [out], nodes=[node], initializers=list(weights.values()), name="layer",
        opset_imports={"": OPSET, DOMAIN: VERSION},
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    attach_functions(model, OPSET)
    serialised: bytes = ir.to_proto(model).SerializeToString()
    return serialised
