"""Recurrent layers token by token: exact forms that trace with a symbolic sequence length.

transformers computes them in chunks, whose number becomes a Python number while tracing and freezes the
sequence length. Here the same recurrence is a scan over tokens (one ONNX ``Scan`` node per layer). It
continues from the given state in every case, also for several tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Step = Callable[[torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, torch.Tensor]]


def scan_tokens(
    step: Step, state: torch.Tensor, tokens: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``step(state, token) -> (state, output)`` over axis 1 of ``tokens`` [B, S, ...].

    Returns:
        outputs [B, S, ...] and the last state.
    """
    from torch._higher_order_ops.scan import scan

    def body(carry: torch.Tensor, token: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        new, out = step(carry, token)
        return new.clone(), out.clone()  # a scan's results may not alias its inputs

    last, outputs = scan(body, state, tuple(t.transpose(0, 1).contiguous() for t in tokens))
    return outputs.transpose(0, 1), last


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_unused: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated delta rule (decay per head) and Kimi delta attention (decay per key channel).

    Args:
        query, key: [B, S, key heads, Dk].
        value: [B, S, value heads, Dv]; each key head serves consecutive value heads.
        g: log decay [B, S, value heads] or [B, S, value heads, Dk].
        beta: [B, S, value heads].
        initial_state: [B, value heads, Dk, Dv].

    Returns:
        [B, S, value heads, Dv] in the dtype of ``query``, and the last state.
    """
    dtype, groups = query.dtype, value.shape[2] // key.shape[2]
    query, key, value, g, beta = (t.float() for t in (query, key, value, g, beta))
    if groups > 1:
        query, key = query.repeat_interleave(groups, dim=2), key.repeat_interleave(groups, dim=2)
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    query = query * query.shape[-1] ** -0.5
    if g.dim() == 3:
        g = g.unsqueeze(-1)
    if initial_state is None:
        initial_state = value.new_zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3])

    def step(state: torch.Tensor, token: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, decay, rate = token
        state = state * decay.unsqueeze(-1)
        delta = (v - torch.matmul(k.unsqueeze(-2), state).squeeze(-2)) * rate.unsqueeze(-1)
        state = state + k.unsqueeze(-1) * delta.unsqueeze(-2)
        return state, torch.matmul(q.unsqueeze(-2), state).squeeze(-2)

    out, last = scan_tokens(step, initial_state.float(), (query, key, value, g.exp(), beta))
    return out.to(dtype), last if output_final_state else None


def mamba_scan(
    inputs: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selective state space: ``h = decay·h + inputs ⊗ b``, ``y = h·c``.

    Args:
        inputs: [B, S, ..., P], already times the time step.
        decay: broadcastable to [B, S, ..., P, N].
        b, c: broadcastable to [B, S, ..., N].
        state: [B, ..., P, N], or None for zeros.

    Returns:
        [B, S, ..., P] and the last state.
    """
    if state is None:
        state = inputs.new_zeros(inputs.shape[0], *inputs.shape[2:], b.shape[-1])

    def step(h: torch.Tensor, token: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        x, factor, b_t, c_t = token
        h = h * factor + x.unsqueeze(-1) * b_t.unsqueeze(-2)
        return h, torch.matmul(h, c_t.unsqueeze(-1)).squeeze(-1)

    return scan_tokens(step, state.float(), (inputs, decay, b, c))


def mamba2_chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_unused: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2 over [B, S, heads, P] with one decay per head; arguments as in transformers."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    heads = hidden_states.shape[2]
    B, C = (t.float().repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    decay = torch.exp(A.float() * dt)[..., None, None]
    out, last = mamba_scan(hidden_states.float() * dt.unsqueeze(-1), decay, B, C, initial_states)
    if D is not None:
        out = out + D.unsqueeze(-1) * hidden_states.float()
    return (out, last) if return_final_states else out


def mamba_selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: torch.Tensor | None = None,
    **_unused: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-1 over channels-first [B, P, S] with one decay per channel and state; arguments as in
    transformers.
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    dt = dt.transpose(1, 2).float()
    decay = torch.exp(dt.unsqueeze(-1) * A.float())
    inputs = dt * hidden_states.transpose(1, 2).float()
    out, last = mamba_scan(inputs, decay, B.transpose(1, 2).float(), C.transpose(1, 2).float(), initial_state)
    out = out.transpose(1, 2)
    if D is not None:
        out = out + hidden_states * D[None, :, None]
    if z is not None:
        out = out * F.silu(z)
    return (out, last) if return_last_state else out


def decayed_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slope: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear attention with a constant decay ``exp(-slope)`` per head (lightning attention).

    Args:
        query, key, value: [B, S, heads, D].
        slope: [heads, 1, 1].
        state: [B, heads, D, D].

    Returns:
        [B, S, heads, D] and the last state.
    """
    factor = torch.exp(-slope)

    def step(h: torch.Tensor, token: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, rate = token
        h = h * rate + k.unsqueeze(-1) * v.unsqueeze(-2)
        return h, torch.matmul(q.unsqueeze(-2), h).squeeze(-2)

    rates = factor.expand(*query.shape[:3], 1, 1)
    return scan_tokens(step, state.float(), (query.float(), key.float(), value.float(), rates))
