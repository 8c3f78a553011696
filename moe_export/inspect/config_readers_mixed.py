"""Readers of configs whose models mix kinds of layers: chunked, linear and full attention, two stacks."""

from __future__ import annotations

from typing import Any

from moe_export.errors import SourceError
from moe_export.inspect.architecture import Architecture, Attention, Dense, Layer, Linear, MoE
from moe_export.inspect.config_fields import Fields
from moe_export.inspect.config_readers import assemble, gated, grouped_query, is_sparse


def llama4(fields: Fields) -> Architecture:
    """Llama 4 with its image encoder."""
    text = fields.part("text_config")
    return _llama4(text, "Llama4ForConditionalGeneration", "language_model.", _vision(fields), fields)


def llama4_text(fields: Fields) -> Architecture:
    """Llama 4 without an image encoder."""
    return _llama4(fields, "Llama4ForCausalLM", "", 0, fields)


def _llama4(fields: Fields, class_name: str, prefix: str, vision: int, whole: Fields) -> Architecture:
    hidden, depth = fields.size("hidden_size"), fields.size("num_hidden_layers")
    inner, dense = fields.size("intermediate_size"), fields.size("intermediate_size_mlp")
    experts, bias = fields.size("num_local_experts"), fields.flag("attention_bias", False)
    step = fields.size("interleave_moe_layer_step", default=1)
    sparse = fields.indices("moe_layers")
    sparse = sparse if sparse is not None else tuple(range(step - 1, depth, step))
    interval = fields.size("no_rope_layer_interval", default=4)
    chunk = fields.optional_size("attention_chunk_size") if fields.given("attention_chunk_size") else 8192
    rotary = fields.indices("no_rope_layers") or tuple(int((i + 1) % interval != 0) for i in range(depth))
    if len(rotary) != depth:
        raise SourceError(f"{fields.where}: 'no_rope_layers' has {len(rotary)} entries; expected {depth}")
    kinds = fields.words("layer_types", depth, ("chunked_attention", "full_attention"))
    kinds = kinds or tuple("chunked_attention" if r else "full_attention" for r in rotary)
    layers = []
    for i in range(depth):
        chunked = kinds[i] == "chunked_attention" and chunk is not None
        attention = grouped_query(
            fields, bias=bias, output_bias=bias, window=chunk if chunked else None,
            kind="chunked" if chunked else "full",
        )  # fmt: skip
        ffn = Dense(gated(hidden, dense), dense) if i not in sparse else MoE(
            experts, fields.size("num_experts_per_tok", default=1), gated(hidden, inner), inner,
            (Linear(hidden, experts),), gated(hidden, inner), 1,
            f"{prefix}model.layers.{i}.feed_forward.experts", {"router": "Llama4Router"},
        )  # fmt: skip
        layers.append(Layer(attention, ffn, 2 * hidden))
    dtype = whole.dtype()
    return assemble(fields, class_name, tuple(layers), vision=vision, dtype=dtype)


def _vision(fields: Fields) -> int:
    """Parameters of Llama 4's image encoder and of the projector into the text model."""
    vision = fields.part("vision_config")
    width, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    patch, output = vision.size("patch_size"), vision.size("vision_output_dim")
    patches = (vision.size("image_size") // patch) ** 2 + 1
    layer = 4 * Linear(width, width, True).parameters + 4 * width
    layer += Linear(width, inner, True).parameters + Linear(inner, width, True).parameters
    projector_in, projector_out = vision.size("projector_input_dim"), vision.size("projector_output_dim")
    return (
        vision.size("num_hidden_layers") * layer
        + vision.size("num_channels", default=3) * patch**2 * width
        + (patches + 1) * width
        + 4 * width
        + inner * projector_in
        + projector_out**2
        + output * fields.part("text_config").size("hidden_size")
    )


def qwen3_next(fields: Fields) -> Architecture:
    """Qwen3-Next: gated delta rule in most layers, gated full attention in the others."""
    hidden, depth = fields.size("hidden_size"), fields.size("num_hidden_layers")
    experts, inner = fields.size("num_experts"), fields.size("moe_intermediate_size")
    shared, dense = fields.size("shared_expert_intermediate_size"), fields.size("intermediate_size")
    interval = fields.size("full_attention_interval", default=4)
    kinds = fields.words("layer_types", depth, ("full_attention", "linear_attention"))
    kinds = kinds or tuple(
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(depth)
    )
    blocks = {"full_attention": _gated_attention(fields), "linear_attention": _delta_rule(fields)}
    norm = fields.flag("norm_topk_prob", True)
    layers = []
    for i in range(depth):
        ffn = Dense(gated(hidden, dense), dense) if not is_sparse(fields, i) else MoE(
            experts, fields.size("num_experts_per_tok"), gated(hidden, inner), inner,
            (Linear(hidden, experts),), (*gated(hidden, shared), Linear(hidden, 1)), 1,
            f"model.layers.{i}.mlp.experts", {"router": "Qwen3NextTopKRouter", "norm_topk_prob": norm},
        )  # fmt: skip
        layers.append(Layer(blocks[kinds[i]], ffn, 2 * hidden))
    return assemble(fields, "Qwen3NextForCausalLM", tuple(layers))


def _gated_attention(fields: Fields) -> Attention:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads, dim = fields.size("num_key_value_heads"), fields.size("head_dim", default=256)
    bias = fields.flag("attention_bias", False)
    linears = (
        Linear(hidden, 2 * heads * dim, bias),  # queries, and a gate for the output
        Linear(hidden, kv_heads * dim, bias),
        Linear(hidden, kv_heads * dim, bias),
        Linear(heads * dim, hidden, bias),
    )
    return Attention("full", linears, heads, kv_heads, dim, dim, norms=2 * dim)


def _delta_rule(fields: Fields) -> Attention:
    hidden = fields.size("hidden_size")
    key_dim, value_dim = fields.size("linear_key_head_dim"), fields.size("linear_value_head_dim")
    key_heads, value_heads = fields.size("linear_num_key_heads"), fields.size("linear_num_value_heads")
    kernel = fields.size("linear_conv_kernel_dim")
    keys, values = key_dim * key_heads, value_dim * value_heads
    channels = 2 * keys + values
    linears = (
        Linear(hidden, 2 * keys + 2 * values),
        Linear(hidden, 2 * value_heads),
        Linear(values, hidden),
    )
    matrix = value_heads * key_dim * value_dim
    return Attention(
        "linear", linears, value_heads, key_heads, key_dim, value_dim,
        state=matrix + channels * kernel,
        # Decay, read with the key, rank-one update, read with the query; then the short convolution.
        state_flops=7 * matrix + 2 * channels * kernel,
        extra=channels * kernel + 2 * value_heads, norms=value_dim,
    )  # fmt: skip


def switch_transformers(fields: Fields) -> Architecture:
    """Switch Transformers: an encoder and a decoder of T5 with one expert per token in some layers."""
    hidden, inner = fields.size("d_model"), fields.size("d_ff")
    heads, dim, experts = fields.size("num_heads"), fields.size("d_kv"), fields.size("num_experts")
    buckets = fields.size("relative_attention_num_buckets", default=32)
    matrices = (Linear(hidden, heads * dim),) * 3 + (Linear(heads * dim, hidden),)
    router = Linear(hidden, experts, fields.flag("router_bias", False))
    ungated = (Linear(hidden, inner), Linear(inner, hidden))
    capacity = fields.size("expert_capacity", default=64)
    routing: dict[str, Any] = {"router": "SwitchTransformersTop1Router", "expert_capacity": capacity}
    layers = []
    for stack in ("encoder", "decoder"):
        if stack == "encoder":
            depth = fields.size("num_layers")
        else:
            depth = fields.optional_size("num_decoder_layers") or fields.size("num_layers")
        sparse = fields.size(f"num_sparse_{stack}_layers", least=0)
        step = depth // sparse if sparse else depth
        place = 1 if stack == "encoder" else 2
        for i in range(depth):
            attention = Attention(
                "full", matrices, heads, heads, dim, dim, extra=buckets * heads if i == 0 else 0, norms=hidden
            )
            name = f"{stack}.block.{i}.layer.{place}.mlp.experts"
            ffn = (
                MoE(experts, 1, ungated, inner, (router,), name=name, routing=routing)
                if step == 1 or (step > 0 and i % step == 1)
                else Dense(ungated, inner)
            )
            cross = Attention("full", matrices, heads, heads, dim, dim, norms=hidden)
            decoding = stack == "decoder"
            layers.append(Layer(attention, ffn, hidden, cross if decoding else None, not decoding))
    return assemble(
        fields, "SwitchTransformersForConditionalGeneration", tuple(layers), tied=True,
        final_norms=2 * hidden, hidden=hidden,
        tables=1 if fields.flag("tie_word_embeddings", True) else 3,  # untied, each stack has its own
    )  # fmt: skip
