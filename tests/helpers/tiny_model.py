"""A two-layer MoE language model small enough to read: its weights and its NumPy reference.

Embedding, then per layer RMS norm, grouped-query attention with RoPE, RMS norm, a router (linear with bias,
softmax, top-k, renormalise) over SwiGLU experts, and a head. Ties go to the lower expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_export.trace import LayerTrace, TracedRun

Array: TypeAlias = NDArray[Any]

LAYERS, VOCAB, BOS, EOS, PAD = 2, 259, 256, 257, 258
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
EXPERTS, TOP_K, INTERMEDIATE = 4, 2, 24
ROPE_BASE, EPSILON, MASKED = 100.0, 1e-6, -1e9


@dataclass(frozen=True)
class TinyLayer:
    """Weights of one layer; every matrix is [in, out], expert matrices are [E, in, out]."""

    attention_norm: Array
    query: Array
    key: Array
    value: Array
    attention_out: Array
    moe_norm: Array
    router: Array
    router_bias: Array
    gate: Array
    up: Array
    down: Array


@dataclass(frozen=True)
class TinyWeights:
    """All weights, float32, drawn from one seed."""

    embedding: Array
    layers: tuple[TinyLayer, ...]
    final_norm: Array
    head: Array

    @classmethod
    def make(cls, seed: int = 0) -> TinyWeights:
        random = np.random.default_rng(seed)

        def draw(*shape: int, gain: float = 1.0) -> Array:
            return (random.standard_normal(shape) * gain / np.sqrt(shape[-2])).astype(np.float32)

        def norm() -> Array:
            return (1.0 + 0.1 * random.standard_normal(HIDDEN)).astype(np.float32)

        def layer() -> TinyLayer:
            return TinyLayer(
                attention_norm=norm(),
                query=draw(HIDDEN, HEADS * HEAD_DIM, gain=1.5),
                key=draw(HIDDEN, KV_HEADS * HEAD_DIM, gain=1.5),
                value=draw(HIDDEN, KV_HEADS * HEAD_DIM),
                attention_out=draw(HEADS * HEAD_DIM, HIDDEN),
                moe_norm=norm(),
                router=draw(HIDDEN, EXPERTS),
                router_bias=np.array([0.8, -0.6, 0.4, -0.5], np.float32),
                gate=draw(EXPERTS, HIDDEN, INTERMEDIATE, gain=1.5),
                up=draw(EXPERTS, HIDDEN, INTERMEDIATE, gain=1.5),
                down=draw(EXPERTS, INTERMEDIATE, HIDDEN, gain=1.5),
            )

        return cls(
            embedding=random.standard_normal((VOCAB, HIDDEN)).astype(np.float32),
            layers=tuple(layer() for _ in range(LAYERS)),
            final_norm=norm(),
            head=draw(HIDDEN, VOCAB, gain=2.0),
        )

    def count(self) -> int:
        """Number of parameters."""
        layers = [v for layer in self.layers for v in vars(layer).values()]
        return sum(int(v.size) for v in [self.embedding, self.final_norm, self.head, *layers])


def rope_tables(positions: Array) -> tuple[Array, Array]:
    """cos and sin [..., HEAD_DIM] for integer ``positions``; the two halves of a head rotate together."""
    inverse = ROPE_BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = positions[..., None] * np.concatenate([inverse, inverse])
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    half = HEAD_DIM // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def _rms_norm(x: Array, gain: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPSILON)) * gain


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class TinyReference:
    """The tiny model in NumPy float32, without a KV cache; implements :class:`moe_export.trace.Reference`."""

    def __init__(self, weights: TinyWeights | None = None) -> None:
        self.weights = weights or TinyWeights.make()

    def run(self, inputs: dict[str, NDArray[np.generic]]) -> TracedRun:
        """``input_ids`` and optional ``attention_mask``, both [batch, sequence] → ``logits`` and traces."""
        w = self.weights
        ids = np.asarray(inputs["input_ids"]).astype(np.int64)
        mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids))).astype(np.int64)
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        sequence = ids.shape[1]
        allowed = np.tril(np.ones((sequence, sequence), bool)) & (mask[:, None, None, :] != 0)
        bias = np.where(allowed, 0.0, MASKED).astype(np.float32)
        x = w.embedding[ids]
        traces = []
        for index, layer in enumerate(w.layers):
            x = x + self._attention(layer, _rms_norm(x, layer.attention_norm), positions, bias)
            trace = self._moe(index, layer, _rms_norm(x, layer.moe_norm).reshape(-1, HIDDEN))
            traces.append(trace)
            x = x + trace.output.reshape(x.shape)
        return TracedRun({"logits": _rms_norm(x, w.final_norm) @ w.head}, tuple(traces))

    @staticmethod
    def _attention(layer: TinyLayer, x: Array, positions: Array, bias: Array) -> Array:
        batch, sequence = x.shape[:2]
        cos, sin = (t[:, None] for t in rope_tables(positions))

        def heads(projection: Array, count: int) -> Array:
            return (x @ projection).reshape(batch, sequence, count, HEAD_DIM).transpose(0, 2, 1, 3)

        query = _rotate(heads(layer.query, HEADS), cos, sin)
        key = _rotate(heads(layer.key, KV_HEADS), cos, sin).repeat(HEADS // KV_HEADS, axis=1)
        value = heads(layer.value, KV_HEADS).repeat(HEADS // KV_HEADS, axis=1)
        scores = query @ key.swapaxes(-1, -2) / np.float32(np.sqrt(HEAD_DIM)) + bias
        mixed = (_softmax(scores) @ value).transpose(0, 2, 1, 3).reshape(batch, sequence, HEADS * HEAD_DIM)
        return mixed @ layer.attention_out

    @staticmethod
    def _moe(index: int, layer: TinyLayer, hidden: Array) -> LayerTrace:
        logits = hidden @ layer.router + layer.router_bias
        probabilities = _softmax(logits)
        ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, :TOP_K]
        weights = np.take_along_axis(probabilities, ids, -1)
        weights = weights / weights.sum(-1, keepdims=True)
        output = np.zeros_like(hidden)
        for token, slot in np.ndindex(*ids.shape):
            expert = ids[token, slot]
            gate = hidden[token] @ layer.gate[expert]
            inner = gate / (1 + np.exp(-gate)) * (hidden[token] @ layer.up[expert])
            output[token] += weights[token, slot] * (inner @ layer.down[expert])
        return LayerTrace(index, f"layers.{index}.moe", ids.astype(np.int32), weights, hidden, output, logits)
