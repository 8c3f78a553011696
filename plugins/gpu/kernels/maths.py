"""Scores, activations and order of the kernels, in float32. Float64 references: ``moe_export.ops``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)); 0 and 1 far out."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x >= 0, precise for small x (Kahan): x scaled by what rounding 1 + x lost."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def score(x: tl.tensor, SCORE: tl.constexpr) -> tl.tensor:
    """[B, E] logits → scores; columns beyond E hold -inf and get no weight."""
    if SCORE == "softmax":
        exponent = tl.exp(x - tl.max(x, axis=1)[:, None])
        result = exponent / tl.sum(exponent, axis=1)[:, None]
    elif SCORE == "sigmoid":
        result = sigmoid(x)
    elif SCORE == "sqrtsoftplus":
        result = tl.sqrt(tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x))))
    else:
        result = x
    return result


@triton.jit
def order_key(x: tl.tensor) -> tl.tensor:
    """int32 that sorts as x does: -0 equals 0, NaN comes below -inf, the least int32 is left free."""
    zero_free = tl.where(x == 0.0, 0.0, x)
    bits = zero_free.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, key, -2147483647)


@triton.jit
def activation(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """silu, gelu, gelu_tanh, relu or relu2 of float32 values."""
    if ACTIVATION == "silu":
        result = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2z)
        result = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu2":
        result = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        result = tl.maximum(x, 0.0)
    return result


@triton.jit
def gate_of(
    gate: tl.tensor, up: tl.tensor, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr
) -> tl.tensor:
    """activation(gate) * up, or gpt-oss's clamped SwiGLU with constants ALPHA and LIMIT."""
    if ACTIVATION == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        result = (up + 1.0) * gate * sigmoid(ALPHA * gate)
    else:
        result = activation(gate, ACTIVATION) * up
    return result
