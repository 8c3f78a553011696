"""How fast a layer's quantised experts are here: as QMoE, as the CPU plugin's op, and beside float32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from ..graph.functions import attach_functions
from ..ops import DOMAIN, OPS, VERSION
from ..ops.packing import pack_down, pack_up
from .qmoe import INT8_ACTIVATIONS, activation_attributes, quantize_experts
from .qmoe_proof import OPSET, qmoe_model
from .quantized_op import op_attributes, op_nodes, pack_experts

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEASURE_LIMIT = 512 * 2**20
"""Bytes of float32 weights that are made for a measurement; of a larger layer, fewer experts are taken."""
TOKENS = (1, 64)
ROUNDS = 9
FLOAT, QMOE, PLUGIN = "float", "qmoe", "plugin"


@dataclass(frozen=True)
class Times:
    """``ms``: form (:data:`FLOAT`, :data:`QMOE`, :data:`PLUGIN`) → milliseconds by number of tokens
    (``T=1``); empty where nothing was measured, and ``note`` says why or how."""

    note: str
    ms: dict[str, dict[str, float]] = field(default_factory=dict)

    def ratios(self, form: str, other: str) -> dict[str, float]:
        """How many times as fast as ``other`` ``form`` is, by number of tokens."""
        return {t: self.ms[other][t] / ms for t, ms in self.ms[form].items()}


def in_words(ratios: Mapping[str, float]) -> str:
    """``1.50 times as fast at T=1, SLOWER at T=64 (1.20 times the time)``."""
    return ", ".join(
        f"{r:.2f} times as fast at {t}" if r >= 1 else f"SLOWER at {t} ({1 / r:.2f} times the time)"
        for t, r in ratios.items()
    )


def compare_times(
    size: tuple[int, int, int, int],
    attributes: Mapping[str, Any],
    forms: tuple[str, ...],
    options: Mapping[str, Any],
    *,
    bits: int,
    block: int,
) -> Times:
    """``forms`` and the float form, run in turns on random tokens; layers of equal form are measured once.

    ``size``: E, K, H, I. ``attributes``: ExpertMLP's. ``options``: ``cpu_plugin`` is the path of the CPU
    plugin's library, which runs the float form; ``threads``.
    """
    plugin = options.get("cpu_plugin")
    if not plugin:
        return Times("not timed: without the CPU plugin there is no float op to time it against")
    count, top_k, hidden, inner = size
    nbytes = 4 * hidden * inner * (3 if attributes["gated"] else 2)
    taken = min(count, MEASURE_LIMIT // nbytes)
    if taken < min(count, max(top_k, 2)):
        return Times(f"not timed here ({count * nbytes / 2**20:.0f} MiB as float32)")
    key = tuple(sorted((k, v) for k, v in attributes.items() if k not in ("layer", "num_experts")))
    ms = _measured(
        _Case((taken, top_k, hidden, inner), key, bits, block), forms, str(plugin), options.get("threads")
    )
    return Times("" if taken == count else f" (with {taken} of {count} experts)", ms)


@dataclass(frozen=True)
class _Case:
    size: tuple[int, int, int, int]
    """E, K, H, I."""
    attributes: tuple[tuple[str, Any], ...]
    bits: int
    block: int


@cache
def _measured(
    case: _Case, forms: tuple[str, ...], plugin: str, threads: int | None
) -> dict[str, dict[str, float]]:
    import numpy as np
    import onnxruntime as ort

    count, top_k, hidden, _ = case.size
    rng = np.random.default_rng(0)
    sessions = {}
    for name, model in _models(case, forms).items():
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if threads:
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if name != QMOE:
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
    return out


def _models(case: _Case, forms: tuple[str, ...]) -> dict[str, bytes]:
    """A model of one random layer in every form."""
    import numpy as np
    import onnx_ir as ir

    count, top_k, hidden, inner = case.size
    attributes = {**dict(case.attributes), "transposed": 0, "packed": 0, "layout": "concatenated"}
    wide = inner * (2 if attributes["gated"] else 1)
    rng = np.random.default_rng(0)
    up = rng.standard_normal((count, wide, hidden), dtype=np.float32) * 0.02
    down = rng.standard_normal((count, hidden, inner), dtype=np.float32) * 0.02
    biases: dict[str, NDArray[np.float32]] = {}
    if attributes["biased"]:
        biases["up_bias"] = np.zeros((count, wide), np.float32)
        biases["down_bias"] = np.zeros((count, hidden), np.float32)
    arrays = (up, down, biases.get("up_bias"), biases.get("down_bias"))
    bits, block = case.bits, case.block
    models = {}
    if QMOE in forms:
        activation = activation_attributes(attributes)
        assert not isinstance(activation, str)
        models[QMOE] = qmoe_model(
            quantize_experts(*arrays, attributes, bits=bits, block=block),
            activation,
            top_k,
            INT8_ACTIVATIONS,
        )
    full = {**attributes, "num_experts": count}
    if PLUGIN in forms:
        model = _OneLayer(hidden, top_k)
        packed = pack_experts(*arrays, full, bits=bits, block=block)
        own = op_attributes(full, bits=bits, block=block)
        models[PLUGIN] = model.serialise(op_nodes(*model.inputs, packed, own, constant=model.constant))
    model = _OneLayer(hidden, top_k)
    given = {"up": pack_up(up, gated=bool(attributes["gated"])), "down": pack_down(down)}
    stored = [model.constant(name, array) for name, array in {**given, **biases}.items()]
    complete = OPS["ExpertMLP"].complete({**full, "packed": 1})
    node = ir.node("ExpertMLP", [*model.inputs, *stored], attributes=complete, domain=DOMAIN)
    models[FLOAT] = model.serialise([node])
    return models


class _OneLayer:
    """A model of one layer in the making: ``hidden`` [T, H], ``expert_ids`` int32 [T, K], ``weights`` [T, K]
    → ``out``."""

    def __init__(self, hidden: int, top_k: int) -> None:
        import onnx_ir as ir

        kinds = {
            "hidden": (ir.DataType.FLOAT, hidden),
            "expert_ids": (ir.DataType.INT32, top_k),
            "weights": (ir.DataType.FLOAT, top_k),
        }
        values = [
            ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(["tokens", width]))
            for name, (kind, width) in kinds.items()
        ]
        self.inputs = (values[0], values[1], values[2])
        self._stored: list[Any] = []

    def constant(self, name: str, array: NDArray[Any]) -> Any:
        import onnx_ir as ir

        self._stored.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self._stored[-1]

    def serialise(self, nodes: list[Any]) -> bytes:
        import onnx_ir as ir

        out = nodes[-1].outputs[0]
        out.name, out.type, out.shape = "out", self.inputs[0].type, self.inputs[0].shape
        graph = ir.Graph(
            list(self.inputs), [out], nodes=nodes, initializers=self._stored, name="layer",
            opset_imports={"": OPSET, DOMAIN: VERSION},
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10)
        attach_functions(model, OPSET)
        serialised: bytes = ir.to_proto(model).SerializeToString()
        return serialised


__all__ = ["FLOAT", "PLUGIN", "QMOE", "Times", "compare_times", "in_words"]
