"""Work of one forward pass of a model on one GPU, kernel by kernel, from its architecture.

Two phases. *Decode*: every sequence gets one new token, with ``context`` tokens in its cache. *Prefill*:
every sequence brings ``context`` new tokens; only its last position goes through the output head.
Encoder-decoder models: prefill is the encoder, decode the decoder with ``context`` tokens on both sides.

Multi-head latent attention decodes on the cached latent itself (queries and outputs absorbed into it) and
prefills on expanded heads. The routed experts' work depends on which are used: see :func:`expert_work`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moe_export.costs import (
    Popularity,
    WeightFormat,
    Work,
    attention,
    elementwise,
    grouped_matmul,
    matmul,
)
from moe_export.inspect.architecture import Architecture, Attention, Dense, Layer, Linear, MoE

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True)
class Kernels:
    """Work of ``launches`` kernels of one part of the model that run one after the other, ``count`` times."""

    part: str
    work: Work
    launches: int
    compute: str
    count: int = 1


@dataclass(frozen=True)
class Step:
    """One forward pass: ``sequences`` with ``context`` tokens each (see the module)."""

    phase: Phase
    sequences: float
    context: int

    @property
    def tokens(self) -> float:
        """New tokens of the pass."""
        return self.sequences if self.phase == "decode" else self.sequences * self.context


def active_layers(arch: Architecture, phase: Phase) -> Counter[Layer]:
    """The layers that run in a phase, alike ones together with their number."""
    if not arch.encoder_decoder:
        return Counter(arch.layers)
    return Counter(arch.decoder if phase == "decode" else arch.encoder)


def shared_kernels(
    arch: Architecture, step: Step, weights: WeightFormat, cache_bytes: float, split: int = 1
) -> Iterator[Kernels]:
    """Everything but routed experts and exchanges, for ``step`` on one GPU.

    ``cache_bytes``: bytes per cached number. ``split``: GPUs that share every matrix, head and cache evenly.
    """
    for layer, count in active_layers(arch, step.phase).items():
        for kernels in _layer(arch, layer, step, weights, cache_bytes, split):
            yield Kernels(kernels.part, kernels.work, kernels.launches, kernels.compute, count)
    if arch.encoder_decoder and step.phase == "prefill":
        # The decoder's keys and values over the encoder's output are computed once.
        for layer, count in Counter(arch.decoder).items():
            if layer.cross is not None:
                work = _matrices(layer.cross.linears[1:3], step.tokens, weights, "attention", split)
                yield Kernels("attention", work, 1, weights.compute, count)
        return
    rows, each = step.sequences, weights.activation_bytes
    head = matmul(rows, arch.head.inputs, arch.head.outputs, weights.bits_of("output_head"), each) * (
        1 / split
    )
    yield Kernels("output_head", head + elementwise(rows, arch.hidden, 2, each), 2, _wide(weights))


def _wide(weights: WeightFormat) -> str:
    """What the parts multiply in that no narrow format covers."""
    return "float32" if weights.compute == "float32" else "bfloat16"


def _matrices(linears: tuple[Linear, ...], rows: float, weights: WeightFormat, part: str, split: int) -> Work:
    work = Work()
    for m in linears:
        work += matmul(rows, m.inputs, m.outputs, weights.bits_of(part), weights.activation_bytes)
    return work * (1 / split)


def _layer(
    arch: Architecture, layer: Layer, step: Step, weights: WeightFormat, cache_bytes: float, split: int
) -> Iterator[Kernels]:
    tokens, each = step.tokens, weights.activation_bytes
    blocks = len(layer.attentions) + 1
    yield Kernels("norms", elementwise(tokens, arch.hidden, 3 * blocks, each), blocks, _wide(weights))
    for block in layer.attentions:
        cross = block is layer.cross
        linears = (block.linears[0], block.linears[3]) if cross else block.linears
        launches = max(2, len(linears) - 2)  # queries, keys and values are one kernel
        work = _matrices(linears, tokens, weights, "attention", split)
        yield Kernels("attention", work, launches, weights.compute)
        core = _core(block, step, cache_bytes, each) * (1 / split)
        yield Kernels("attention_core", core, 1, _wide(weights))
    ffn = layer.ffn
    if isinstance(ffn, Dense):
        work = _matrices(ffn.linears, tokens, weights, "dense_layers", split)
        yield Kernels("dense_layers", work, 2, weights.compute)
        return
    router = _matrices(ffn.router, tokens, weights, "router", 1)
    yield Kernels("router", router + elementwise(tokens, ffn.experts, 2, each), 2, _wide(weights))
    if ffn.shared:
        work = _matrices(ffn.shared, tokens, weights, "shared_experts", split)
        yield Kernels("shared_experts", work, 2, weights.compute)


def _core(block: Attention, step: Step, cache_bytes: float, each: int) -> Work:
    context = step.context
    width = block.heads * max(block.qk_dim, block.v_dim)
    if step.phase == "decode":
        read = block.cache_elements(context) * cache_bytes
        if block.kind == "linear":
            read *= 2  # the state is read and written
        return attention(block.flops(context), read, 1, width, each) * step.sequences
    written = block.cache_elements(context) * cache_bytes
    keys = float(context * block.kv_heads * (block.qk_dim + block.v_dim) * each)
    work = attention(block.prefill_flops(context), written, context, width, each) + Work(activations=keys)
    return work * step.sequences


def expert_work(moe: MoE, rows: float, used: float, weights: WeightFormat) -> Work:
    """The routed experts' matrices for ``rows`` choices that fall on ``used`` experts of one GPU."""
    shapes = tuple((m.inputs, m.outputs) for m in moe.expert)
    return grouped_matmul(rows, used, shapes, weights.bits_of("routed_experts"), weights.activation_bytes)


def movement_work(arch: Architecture, tokens: float, rows: float, weights: WeightFormat) -> Work:
    """Bringing tokens to their experts' rows and adding the results up again."""
    return elementwise(tokens + rows, arch.hidden, 2, weights.activation_bytes)


EXPERT_LAUNCHES = 4
"""Kernels of routed experts: dispatch, first and second grouped multiplication, combine."""


def expert_kernels(
    arch: Architecture, step: Step, weights: WeightFormat, popularity: Popularity | None = None
) -> Iterator[Kernels]:
    """Routed experts on one GPU that holds all of them; experts used are expectations.

    ``popularity`` is that of every layer; uniform by default.
    """
    for layer, count in active_layers(arch, step.phase).items():
        moe = layer.ffn
        if isinstance(moe, Dense):
            continue
        chances = popularity or Popularity.uniform(moe.experts, moe.top_k)
        rows = step.tokens * moe.top_k
        work = expert_work(moe, rows, chances.touched(step.tokens), weights)
        work += movement_work(arch, step.tokens, rows, weights)
        yield Kernels("routed_experts", work, EXPERT_LAUNCHES, weights.compute, count)


def whole_work(arch: Architecture, step: Step, weights: WeightFormat, cache_bytes: float) -> Work:
    """All work of ``step`` on one GPU, uniform routing."""
    total = Work()
    for kernels in (
        *shared_kernels(arch, step, weights, cache_bytes),
        *expert_kernels(arch, step, weights),
    ):
        total += kernels.work * kernels.count
    return total
