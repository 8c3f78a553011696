"""What a model's config.json says about experts and quantisation, without building the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_SWITCHES = ("is_moe", "enable_moe_block")
_TEXT_FIRST = ("text_config", "thinker_config", "llm_config", "language_config", "ffn_config", "decoder")
_NOT_TEXT = ("vision_config", "audio_config", "talker_config", "code2wav_config", "quantization_config")

_BY_CONFIG = {"compressed-tensors": "CompressedTensorsConfig", "metal": "MetalConfig"}
"""Methods that transformers dequantises while loading, and the class that asks for it."""
READ = ("fp8", "mxfp4", "gptq", "awq")
"""Methods whose checkpoints are read as they are (:mod:`moe_export.importer.quantized`)."""
_BY_MODEL = ("bitsandbytes", "higgs")
"""Methods that transformers dequantises after loading."""


def experts_in_config(config: Mapping[str, Any]) -> int | None:
    """The number of routed experts per MoE layer that a model config states; None when it is dense.

    Looks for the key names of every MoE config of transformers, at the top and in nested configs, the text
    model's first. A single expert, and experts that the config switches off, count as dense. Where layers
    differ, the largest number.
    """
    if any(config.get(key) is False for key in _EXPERT_SWITCHES):
        return None
    for key in _EXPERT_KEYS:
        value = config.get(key)
        items = value if isinstance(value, (list, tuple)) else [value]
        counts = [item for item in items if type(item) is int and item > 1]
        if counts:
            return max(counts)
    parts = {str(key): value for key, value in config.items() if isinstance(value, Mapping)}
    middle = sorted(set(parts) - set(_TEXT_FIRST) - set(_NOT_TEXT))
    for key in (*_TEXT_FIRST, *middle, *_NOT_TEXT[:-1]):
        found = experts_in_config(parts[key]) if key in parts else None
        if found is not None:
            return found
    return None


def quantized_text(quantization: Any) -> str:
    """Why a quantised checkpoint is refused, and what to do."""
    fields = quantization if isinstance(quantization, Mapping) else {}
    method = str(fields.get("quant_method") or "")
    if not method and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        method = "bitsandbytes"
    text = (
        f"the weights are quantised ({method or 'method not stated'}), moe-export reads float weights and "
        f"{', '.join(READ)}; "
    )
    if method in _BY_CONFIG:
        return (
            f"{text}dequantise first: AutoModelForCausalLM.from_pretrained(DIR, quantization_config="
            f"transformers.{_BY_CONFIG[method]}(dequantize=True)).save_pretrained(NEW_DIR)"
        )
    if method in _BY_MODEL:
        return (
            f"{text}dequantise first, where {method} runs: "
            "AutoModelForCausalLM.from_pretrained(DIR).dequantize()"
            ".save_pretrained(NEW_DIR)"
        )
    return f"{text}transformers has no dequantisation for it, so take the checkpoint it was made from"
