"""A language model as a list of layers with matrix sizes: what its config says, without building it.

Everything about parameters, memory and arithmetic is derived from this. Counting rule: every parameter that
the transformers class of the model registers is counted once (a matrix that two modules share is one);
buffers such as the selection biases of DeepSeek-V3's router are not parameters. Parts that only training or
speculative decoding uses (multi-token prediction) are not part of that class and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moe_export.errors import UsageError

COMPONENTS = (
    "embeddings", "output_head", "attention", "router", "routed_experts", "shared_experts", "dense_layers",
    "norms", "vision",
)  # fmt: skip
"""Parts that parameters are counted by, in the order tables show them."""

Kind = Literal["full", "sliding", "chunked", "mla", "linear"]


@dataclass(frozen=True)
class Linear:
    """One matrix [``outputs``, ``inputs``] with an optional bias vector."""

    inputs: int
    outputs: int
    bias: bool = False

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.outputs < 1:
            raise UsageError(f"a matrix of {self.outputs} x {self.inputs}; expected sizes of 1 or more")

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Attention:
    """One attention block. Sizes are per head; ``extra`` counts parameters that are neither matrix nor norm.

    ``window``: tokens that a ``sliding`` or ``chunked`` block looks back at. ``latent`` and ``rope``: what an
    ``mla`` block caches per token. ``state``: elements that a ``linear`` block keeps per sequence, whatever
    its length; ``state_flops``: its arithmetic per token beside the matrices.
    """

    kind: Kind
    linears: tuple[Linear, ...]
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    window: int | None = None
    latent: int = 0
    rope: int = 0
    state: int = 0
    state_flops: int = 0
    extra: int = 0
    norms: int = 0

    def __post_init__(self) -> None:
        if self.kind in ("sliding", "chunked") and not self.window:
            raise UsageError(f"{self.kind} attention without a window")

    def seen(self, context: int) -> int:
        """Cached tokens that a token at position ``context`` attends to."""
        return min(context, self.window) if self.window is not None else context

    def cache_elements(self, context: int) -> int:
        """Numbers that one sequence of ``context`` tokens keeps in the cache."""
        if self.kind == "linear":
            return self.state
        if self.kind == "mla":
            return (self.latent + self.rope) * context
        return self.kv_heads * (self.qk_dim + self.v_dim) * self.seen(context)

    def flops(self, context: int) -> int:
        """Scores and weighted sum for one new token over ``context`` cached ones; matrices not included.

        MLA is counted over the cached latent (queries and outputs absorbed), as decoding does it.
        """
        if self.kind == "linear":
            return self.state_flops
        seen = self.seen(context)
        if self.kind == "mla":
            return 2 * self.heads * (2 * self.latent + self.rope) * seen
        return 2 * self.heads * (self.qk_dim + self.v_dim) * seen

    def prefill_flops(self, tokens: int) -> int:
        """The same for all of ``tokens`` causal tokens of one sequence at once; MLA on expanded heads."""
        if self.kind == "linear":
            return self.state_flops * tokens
        window = self.seen(tokens)
        if self.kind == "chunked":
            whole, rest = divmod(tokens, window)
            pairs = whole * window * (window + 1) // 2 + rest * (rest + 1) // 2
        else:
            pairs = window * (window + 1) // 2 + (tokens - window) * window
        return 2 * self.heads * (self.qk_dim + self.v_dim) * pairs

    @property
    def expanded(self) -> Attention:
        """This block with whole keys and values in the cache instead of a latent; itself if it has none."""
        if self.kind != "mla":
            return self
        return replace(self, kind="full", kv_heads=self.heads, latent=0, rope=0)


@dataclass(frozen=True)
class Dense:
    """A feed-forward block that every token uses."""

    linears: tuple[Linear, ...]
    intermediate: int


@dataclass(frozen=True)
class MoE:
    """``top_k`` of ``experts`` alike experts per token, plus shared ones that every token uses."""

    experts: int
    top_k: int
    expert: tuple[Linear, ...]
    intermediate: int
    router: tuple[Linear, ...]
    shared: tuple[Linear, ...] = ()
    shared_experts: int = 0
    name: str = field(default="", compare=False)
    """Path of the experts' module in the transformers class."""
    routing: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.experts < 1 or not 1 <= self.top_k <= self.experts:
            raise UsageError(
                f"{self.top_k} of {self.experts} experts per token: expected 1 to {self.experts}"
            )

    @property
    def expert_parameters(self) -> int:
        return sum(matrix.parameters for matrix in self.expert)


@dataclass(frozen=True)
class Layer:
    """One layer. ``cross``: attention of a decoder over an encoder's output. ``norms``: their parameters."""

    attention: Attention
    ffn: Dense | MoE
    norms: int
    cross: Attention | None = None
    encoder: bool = False

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return (self.attention,) if self.cross is None else (self.attention, self.cross)

    def parameters(self) -> dict[str, int]:
        """Parameters by component."""
        counts = dict.fromkeys(COMPONENTS, 0)
        counts["norms"] = self.norms + sum(block.norms for block in self.attentions)
        counts["attention"] = sum(
            sum(m.parameters for m in block.linears) + block.extra for block in self.attentions
        )
        if isinstance(self.ffn, Dense):
            counts["dense_layers"] = sum(m.parameters for m in self.ffn.linears)
        else:
            counts["router"] = sum(m.parameters for m in self.ffn.router)
            counts["routed_experts"] = self.ffn.experts * self.ffn.expert_parameters
            counts["shared_experts"] = sum(m.parameters for m in self.ffn.shared)
        return counts


@dataclass(frozen=True)
class Architecture:
    """A whole model. ``head``: its output matrix, which is the embedding matrix where ``tied``."""

    model_type: str
    class_name: str
    dtype: str
    vocabulary: int
    hidden: int
    layers: tuple[Layer, ...]
    head: Linear
    tied: bool
    final_norms: int
    max_positions: int | None
    vision: int = 0
    """Parameters of an image encoder and its projector, which text does not use."""
    tables: int = 1
    """Embedding matrices of the same size; two stacks without tied embeddings have their own."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError(f"{self.class_name}: a model without layers")

    @property
    def moe_layers(self) -> tuple[MoE, ...]:
        return tuple(layer.ffn for layer in self.layers if isinstance(layer.ffn, MoE))

    @property
    def encoder_decoder(self) -> bool:
        return any(layer.encoder for layer in self.layers)

    @property
    def decoder(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if not layer.encoder)

    @property
    def encoder(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.encoder)

    def parameters(self) -> dict[str, int]:
        """All parameters by component (see :data:`COMPONENTS`)."""
        counts = dict.fromkeys(COMPONENTS, 0)
        for layer in self.layers:
            for name, count in layer.parameters().items():
                counts[name] += count
        counts["embeddings"] = self.tables * self.vocabulary * self.hidden
        counts["output_head"] = (
            (self.head.outputs if self.head.bias else 0) if self.tied else self.head.parameters
        )
        counts["norms"] += self.final_norms
        counts["vision"] = self.vision
        return counts

    def active_parameters(self) -> dict[str, int]:
        """Parameters of one text token: K of each layer's E routed experts, no vision, all of the rest."""
        counts = self.parameters()
        counts["routed_experts"] = sum(moe.top_k * moe.expert_parameters for moe in self.moe_layers)
        counts["vision"] = 0
        return counts

    def cache_elements(self, context: int) -> int:
        """Numbers that a sequence of ``context`` tokens keeps; encoder-decoder: ``context`` in each half."""
        return sum(block.cache_elements(context) for layer in self.decoder for block in layer.attentions)

    def with_expanded_cache(self) -> Architecture:
        """The same model caching whole keys and values where MLA could cache a latent."""
        return replace(
            self, layers=tuple(replace(layer, attention=layer.attention.expanded) for layer in self.layers)
        )

    def dense_like(self, which: Literal["active", "total"]) -> Architecture:
        """A dense model with the same attention, embeddings and depth, and as many feed-forward parameters as
        one token uses here (``active``) or as there are (``total``); routers are left out.
        """
        return replace(self, layers=tuple(_dense(layer, which) for layer in self.layers))


def _dense(layer: Layer, which: Literal["active", "total"]) -> Layer:
    moe = layer.ffn
    if isinstance(moe, Dense):
        return layer
    times = moe.top_k if which == "active" else moe.experts
    *ups, down = moe.expert
    wide = (
        *(Linear(m.inputs, m.outputs * times, m.bias) for m in ups),
        Linear(down.inputs * times, down.outputs, down.bias),
    )
    return replace(layer, ffn=Dense(wide + moe.shared, times * moe.intermediate))
