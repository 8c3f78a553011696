"""From a model's config to its :class:`Architecture`, by family. No torch, no transformers.

Each reader follows the family's class in transformers 5.23, module by module; tests compare every count with
that class built on the meta device. A field that a config leaves out and that has no single default here
raises :class:`MissingFieldError`; callers may then ask transformers for the completed config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_export.errors import UnsupportedModelError, choices_text
from moe_export.inspect.architecture import Architecture, Attention, Dense, Layer, Linear, MoE
from moe_export.inspect.config_fields import Fields

Reader = Callable[[Fields], Architecture]


def gated(hidden: int, inner: int, bias: bool = False) -> tuple[Linear, ...]:
    """Gate, up and down matrix of one feed-forward block or expert."""
    return (Linear(hidden, inner, bias), Linear(hidden, inner, bias), Linear(inner, hidden, bias))


def grouped_query(
    fields: Fields,
    *,
    head_dim: int | None = None,
    bias: bool = False,
    output_bias: bool = False,
    window: int | None = None,
    kind: str | None = None,
    extra: int = 0,
    norms: int = 0,
) -> Attention:
    """Attention with separate q, k, v and o matrices. ``bias`` is that of q, k and v."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", default=heads)
    dim = head_dim or fields.optional_size("head_dim") or hidden // heads
    linears = (
        Linear(hidden, heads * dim, bias),
        Linear(hidden, kv_heads * dim, bias),
        Linear(hidden, kv_heads * dim, bias),
        Linear(heads * dim, hidden, output_bias),
    )
    name: Any = kind or ("full" if window is None else "sliding")
    return Attention(name, linears, heads, kv_heads, dim, dim, window, extra=extra, norms=norms)


def assemble(
    fields: Fields,
    class_name: str,
    layers: tuple[Layer, ...],
    *,
    tied: bool = False,
    head_bias: bool = False,
    final_norms: int | None = None,
    hidden: int | None = None,
    vision: int = 0,
    tables: int = 1,
    dtype: str | None = None,
) -> Architecture:
    """The whole model around its layers."""
    width = hidden or fields.size("hidden_size")
    vocabulary = fields.size("vocab_size")
    return Architecture(
        model_type=str(fields.values.get("model_type", "")),
        class_name=class_name,
        dtype=dtype or fields.dtype(),
        vocabulary=vocabulary,
        hidden=width,
        layers=layers,
        head=Linear(width, vocabulary, head_bias),
        tied=fields.flag("tie_word_embeddings", tied),
        final_norms=width if final_norms is None else final_norms,
        max_positions=fields.optional_size("max_position_embeddings"),
        vision=vision,
        tables=tables,
    )


def _depth(fields: Fields) -> int:
    return fields.size("num_hidden_layers")


def _window(fields: Fields, default: int | None, switch: str | None = None) -> int | None:
    if switch is not None and not fields.flag(switch, False):
        return None
    return fields.optional_size("sliding_window") if fields.given("sliding_window") else default


def _experts(
    fields: Fields,
    index: int,
    count: int,
    inner: int,
    routing: dict[str, Any],
    *,
    bias: bool = False,
    shared: tuple[Linear, ...] = (),
    shared_experts: int = 0,
    block: str = "mlp",
) -> MoE:
    """Gated experts behind one linear router, in layer ``index``. ``bias``: of router and experts."""
    hidden = fields.size("hidden_size")
    return MoE(
        count,
        fields.size("num_experts_per_tok"),
        gated(hidden, inner, bias),
        inner,
        (Linear(hidden, count, bias),),
        shared,
        shared_experts,
        f"model.layers.{index}.{block}.experts",
        routing,
    )


def _router_facts(fields: Fields, name: str, **defaults: Any) -> dict[str, Any]:
    """What :func:`moe_export.inspect.layers.find_expert_blocks` reports of the built module.

    ``defaults``: fields with the values that the family's class gives them.
    """
    facts = {key: fields.values.get(key, default) for key, default in defaults.items()}
    if "n_group" in facts:
        facts["num_group"] = facts.pop("n_group")
    return {"router": name} | {k: v for k, v in facts.items() if isinstance(v, (bool, int, float, str))}


def _llama(fields: Fields) -> Architecture:
    hidden = fields.size("hidden_size")
    bias = fields.flag("attention_bias", False)
    attention = grouped_query(fields, bias=bias, output_bias=bias)
    ffn = Dense(
        gated(hidden, fields.size("intermediate_size"), fields.flag("mlp_bias", False)),
        fields.size("intermediate_size"),
    )
    return assemble(fields, "LlamaForCausalLM", (Layer(attention, ffn, 2 * hidden),) * _depth(fields))


def _mistral(fields: Fields) -> Architecture:
    hidden, inner = fields.size("hidden_size"), fields.size("intermediate_size")
    attention = grouped_query(fields, window=_window(fields, 4096))
    layer = Layer(attention, Dense(gated(hidden, inner), inner), 2 * hidden)
    return assemble(fields, "MistralForCausalLM", (layer,) * _depth(fields))


def _mixtral(fields: Fields) -> Architecture:
    hidden, inner = fields.size("hidden_size"), fields.size("intermediate_size")
    experts = fields.size("num_local_experts")
    attention = grouped_query(fields, window=_window(fields, None))
    routing = {"router": "MixtralTopKRouter"}
    layers = tuple(
        Layer(attention, _experts(fields, i, experts, inner, routing), 2 * hidden)
        for i in range(_depth(fields))
    )
    return assemble(fields, "MixtralForCausalLM", layers)


def _phimoe(fields: Fields) -> Architecture:
    hidden, inner = fields.size("hidden_size"), fields.size("intermediate_size")
    experts, bias = fields.size("num_local_experts"), fields.flag("attention_bias", False)
    attention = grouped_query(fields, bias=bias, output_bias=bias, window=_window(fields, None))
    routing = {"router": "PhimoeTopKRouter"}
    norms = 4 * hidden  # weight and bias of two LayerNorms
    layers = tuple(
        Layer(attention, _experts(fields, i, experts, inner, routing), norms) for i in range(_depth(fields))
    )
    return assemble(
        fields,
        "PhimoeForCausalLM",
        layers,
        head_bias=fields.flag("lm_head_bias", False),
        final_norms=2 * hidden,
    )


def _granitemoe(fields: Fields) -> Architecture:
    hidden, inner = fields.size("hidden_size"), fields.size("intermediate_size")
    experts, bias = fields.size("num_local_experts"), fields.flag("attention_bias", False)
    attention = grouped_query(
        fields, bias=bias, output_bias=bias, head_dim=hidden // fields.size("num_attention_heads")
    )
    routing = {"router": "GraniteMoeTopKRouter"}
    layers = tuple(
        Layer(
            attention, _experts(fields, i, experts, inner, routing, block="block_sparse_moe"), 2 * hidden
        )
        for i in range(_depth(fields))
    )
    return assemble(fields, "GraniteMoeForCausalLM", layers)


def _olmoe(fields: Fields) -> Architecture:
    hidden, inner = fields.size("hidden_size"), fields.size("intermediate_size")
    heads, experts = fields.size("num_attention_heads"), fields.size("num_experts")
    bias = fields.flag("attention_bias", False)
    kv_width = hidden // heads * fields.size("num_key_value_heads", default=heads)
    attention = grouped_query(fields, bias=bias, output_bias=bias, norms=hidden + kv_width)
    routing = _router_facts(fields, "OlmoeTopKRouter", norm_topk_prob=False)
    layers = tuple(
        Layer(attention, _experts(fields, i, experts, inner, routing), 2 * hidden)
        for i in range(_depth(fields))
    )
    return assemble(fields, "OlmoeForCausalLM", layers)


def is_sparse(fields: Fields, index: int) -> bool:
    """Whether Qwen's rule gives layer ``index`` experts."""
    step = fields.size("decoder_sparse_step", default=1)
    only_dense = fields.indices("mlp_only_layers") or ()
    return index not in only_dense and (index + 1) % step == 0


def _qwen2_moe(fields: Fields) -> Architecture:
    hidden, depth, experts = fields.size("hidden_size"), _depth(fields), fields.size("num_experts")
    inner, shared = fields.size("moe_intermediate_size"), fields.size("shared_expert_intermediate_size")
    dense = fields.size("intermediate_size")
    window = _window(fields, 4096, "use_sliding_window")
    kinds = fields.words("layer_types", depth, ("full_attention", "sliding_attention"))
    most = fields.size("max_window_layers", default=28, least=0)
    routing = _router_facts(fields, "Qwen2MoeTopKRouter", norm_topk_prob=False)
    layers = []
    for i in range(depth):
        slides = kinds[i] == "sliding_attention" if kinds else bool((i + 1) % 2) and i < most
        attention = grouped_query(
            fields, bias=fields.flag("qkv_bias", True), window=window if slides else None
        )
        ffn = Dense(gated(hidden, dense), dense) if not is_sparse(fields, i) else _experts(
            fields, i, experts, inner, routing,
            shared=(*gated(hidden, shared), Linear(hidden, 1)), shared_experts=1,
        )  # fmt: skip
        layers.append(Layer(attention, ffn, 2 * hidden))
    return assemble(fields, "Qwen2MoeForCausalLM", tuple(layers))


def _qwen3_moe(fields: Fields) -> Architecture:
    hidden, experts = fields.size("hidden_size"), fields.size("num_experts")
    inner, dense = fields.size("moe_intermediate_size"), fields.size("intermediate_size")
    bias = fields.flag("attention_bias", False)
    dim = fields.optional_size("head_dim") or hidden // fields.size("num_attention_heads")
    attention = grouped_query(
        fields, bias=bias, output_bias=bias, norms=2 * dim, window=_window(fields, 4096, "use_sliding_window")
    )
    routing = _router_facts(fields, "Qwen3MoeTopKRouter", norm_topk_prob=False)
    layers = tuple(
        Layer(
            attention,
            Dense(gated(hidden, dense), dense) if not is_sparse(fields, i)
            else _experts(fields, i, experts, inner, routing),
            2 * hidden,
        )
        for i in range(_depth(fields))
    )  # fmt: skip
    return assemble(fields, "Qwen3MoeForCausalLM", layers)


def _gpt_oss(fields: Fields) -> Architecture:
    hidden, inner, depth = fields.size("hidden_size"), fields.size("intermediate_size"), _depth(fields)
    experts, bias = fields.size("num_local_experts"), fields.flag("attention_bias", True)
    kinds = fields.words("layer_types", depth, ("full_attention", "sliding_attention"))
    window = _window(fields, 128)
    layers = tuple(
        Layer(
            grouped_query(
                fields, bias=bias, output_bias=bias, extra=fields.size("num_attention_heads"),
                window=window if (kinds[i] == "sliding_attention" if kinds else (i + 1) % 2) else None),
            _experts(fields, i, experts, inner, {"router": "GptOssTopKRouter"}, bias=True),
            2 * hidden,
        )
        for i in range(depth)
    )  # fmt: skip
    return assemble(fields, "GptOssForCausalLM", layers)


def _glm4_moe(fields: Fields) -> Architecture:
    hidden, experts = fields.size("hidden_size"), fields.size("n_routed_experts")
    inner, dense = fields.size("moe_intermediate_size"), fields.size("intermediate_size")
    shared = fields.size("n_shared_experts", default=1)
    dim = fields.optional_size("head_dim") or hidden // fields.size("num_attention_heads")
    attention = grouped_query(
        fields,
        bias=fields.flag("attention_bias", False),
        norms=2 * dim if fields.flag("use_qk_norm", False) else 0,
    )
    first = fields.size("first_k_dense_replace", default=1, least=0)
    routing = _router_facts(
        fields, "Glm4MoeTopkRouter", norm_topk_prob=True, topk_group=1, routed_scaling_factor=1.0, n_group=1
    )
    layers = tuple(
        Layer(
            attention,
            Dense(gated(hidden, dense), dense) if i < first else _experts(
                fields, i, experts, inner, routing,
                shared=gated(hidden, inner * shared), shared_experts=shared),
            2 * hidden,
        )
        for i in range(_depth(fields))
    )  # fmt: skip
    return assemble(fields, "Glm4MoeForCausalLM", layers)


def _deepseek(fields: Fields, version: int) -> Architecture:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    nope, rope, value = (fields.size(n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    latent, query = fields.size("kv_lora_rank"), fields.optional_size("q_lora_rank")
    if query is None and not fields.given("q_lora_rank"):
        fields.size("q_lora_rank")  # null means none, missing means the class's default: not guessed here
    bias = fields.flag("attention_bias", False)
    queries = (
        (Linear(hidden, heads * (nope + rope)),)
        if query is None
        else (Linear(hidden, query, bias), Linear(query, heads * (nope + rope)))
    )
    linears = (
        *queries,
        Linear(hidden, latent + rope, bias),
        Linear(latent, heads * (nope + value)),
        Linear(heads * value, hidden, bias),
    )
    attention = Attention(
        "mla",
        linears,
        heads,
        heads,
        nope + rope,
        value,
        latent=latent,
        rope=rope,
        norms=latent + (query or 0),
    )
    experts, inner = fields.size("n_routed_experts"), fields.size("moe_intermediate_size")
    shared, dense = fields.size("n_shared_experts"), fields.size("intermediate_size")
    first = fields.size("first_k_dense_replace", least=0)
    defaults = (
        {"norm_topk_prob": True, "topk_group": 4, "routed_scaling_factor": 2.5, "n_group": 8}
        if version == 3
        else {"topk_group": None, "routed_scaling_factor": 1.0, "n_group": None}
    )
    routing = _router_facts(fields, f"DeepseekV{version}TopkRouter", **defaults)
    layers = tuple(
        Layer(
            attention,
            Dense(gated(hidden, dense), dense) if i < first else _experts(
                fields, i, experts, inner, routing,
                shared=gated(hidden, inner * shared), shared_experts=shared),
            2 * hidden,
        )
        for i in range(_depth(fields))
    )  # fmt: skip
    return assemble(fields, f"DeepseekV{version}ForCausalLM", layers)


def _readers() -> dict[str, Reader]:
    from moe_export.inspect.config_readers_mixed import llama4, llama4_text, qwen3_next, switch_transformers

    return {
        "deepseek_v2": lambda fields: _deepseek(fields, 2),
        "deepseek_v3": lambda fields: _deepseek(fields, 3),
        "glm4_moe": _glm4_moe,
        "gpt_oss": _gpt_oss,
        "granitemoe": _granitemoe,
        "kimi_k2": lambda fields: _deepseek(fields, 3),
        "llama": _llama,
        "llama4": llama4,
        "llama4_text": llama4_text,
        "mistral": _mistral,
        "mixtral": _mixtral,
        "olmoe": _olmoe,
        "phimoe": _phimoe,
        "qwen2_moe": _qwen2_moe,
        "qwen3_moe": _qwen3_moe,
        "qwen3_next": qwen3_next,
        "switch_transformers": switch_transformers,
    }


def has_reader(model_type: object) -> bool:
    """Whether :func:`read_architecture` knows this model type."""
    return model_type in _readers()


def read_architecture(values: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a config describes; ``where`` names the config in errors.

    Raises:
        UnsupportedModelError: no reader for its model type.
        MissingFieldError: a field is missing. SourceError: a field has a wrong value.
    """
    readers = _readers()
    model_type = str(values.get("model_type"))
    if model_type not in readers:
        raise UnsupportedModelError(
            f"{where}: the costs of model type {model_type!r} cannot be derived from its config; "
            + choices_text(model_type, readers)
        )
    return readers[model_type](Fields(values, where))
