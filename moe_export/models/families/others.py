"""Encoder-decoder and vision families."""

from __future__ import annotations

# fmt: off (tables: values of one kind stand on one line)
from moe_export.models.families.entry import Family

OTHERS: tuple[Family, ...] = (
    Family("switch_transformers", "works",
           "softmax, top-1 of 4, at most 3 tokens per expert and sequence, the rest "
           "dropped", "SwitchTransformersForConditionalGeneration",
           {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_heads": 4, "num_experts": 4,
            "expert_capacity": 3, "router_jitter_noise": 0.0, "dropout_rate": 0.0, "pad_token_id": 0,
            "eos_token_id": 1, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16},
           also=("SwitchTransformersEncoderModel",)),
    Family("nllb_moe", "refused", "softmax, top-2, capacity per expert, the rest dropped",
           reason="transformers 5.23.0 hands its experts a 0/1 mask where expert ids are expected, so "
           "experts 0 and 1 compute every token whatever the router chose; an engine equal to it would carry "
           "that defect, and a right one would differ from its reference"),
    Family("vitpose_backbone", "refused",
           "no router: the caller names one expert per image (the data set)",
           reason="no token is routed: the caller names the expert, and transformers computes every expert "
           "for every image; export the backbone of the wanted data set as an own module"),
)
