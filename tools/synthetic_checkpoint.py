"""Checkpoints of published models' shapes with made-up weights.

They are laid out as save_pretrained() of transformers does: one matrix per expert where published ones have
that. In bfloat16; or, as DeepSeek-V3 is published, linear layers in float8 with a scale per block.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARD_BYTES = 5 << 30
_ITEMS = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
_BLOCK = 64 << 20
FP8_BLOCK = 128

Tensors = list[tuple[str, str, tuple[int, ...]]]
"""Name, dtype and shape of each."""


def config_of(preset: str, layers: int | None) -> dict[str, Any]:
    """config.json of a preset, with its first ``layers`` layers (None: all), without quantisation."""
    from moe_export.inspect.presets import get_preset

    config = dict(get_preset(preset).config)
    config.pop("quantization_config", None)
    if layers is not None:
        whole = config["num_hidden_layers"]
        config["num_hidden_layers"] = layers
        for key, value in config.items():
            if isinstance(value, list) and len(value) == whole:
                config[key] = value[:layers]
    return config


def tensors_of(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a checkpoint with that config."""
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    built = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    cls = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = cls._from_config(built, dtype=torch.bfloat16)
    model._weight_conversions = get_model_conversion_mapping(model)
    tied = set(model.all_tied_weights_keys or {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return [(name, tuple(t.shape)) for name, t in revert_weight_conversion(model, state).items()]


def in_fp8(tensors: list[tuple[str, tuple[int, ...]]]) -> Tensors:
    """Projections in float8, each followed by its scales; the rest in bfloat16."""
    made: Tensors = []
    for name, shape in tensors:
        if "_proj" in name and name.endswith(".weight") and len(shape) == 2:
            blocks = (-(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK))
            made += [(name, "F8_E4M3", shape), (f"{name}_scale_inv", "F32", blocks)]
        else:
            made.append((name, "BF16", shape))
    return made


def write_checkpoint(
    folder: Path,
    model: str | dict[str, Any],
    layers: int | None = None,
    *,
    sparse: bool = False,
    fp8: bool = False,
) -> int:
    """Write the checkpoint; returns the bytes of its tensors.

    ``model``: a preset, or config.json. ``sparse``: the weights are holes, which read as zeros and take no
    space. Otherwise small random numbers. ``fp8``: linear layers in float8, as DeepSeek-V3 is published.
    """
    config = config_of(model, layers) if isinstance(model, str) else model
    if fp8:
        block = {"weight_block_size": [FP8_BLOCK, FP8_BLOCK], "fmt": "e4m3"}
        config = {**config, "quantization_config": {"quant_method": "fp8", **block}}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    plain = tensors_of({k: v for k, v in config.items() if k != "quantization_config"})
    tensors = in_fp8(plain) if fp8 else [(name, "BF16", shape) for name, shape in plain]
    shards = list(_shards(tensors))
    places = {}
    total = 0
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / name, shard, sparse)
        places.update(dict.fromkeys((tensor for tensor, _, _ in shard), name))
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return total


def _shards(tensors: Tensors) -> Iterator[Tensors]:
    shard: Tensors = []
    size = 0
    for name, dtype, shape in tensors:
        count = math.prod(shape) * _ITEMS[dtype]
        if shard and size + count > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, dtype, shape))
        size += count
    yield shard


def _write_shard(path: Path, tensors: Tensors, sparse: bool) -> int:
    header: dict[str, Any] = {}
    size = 0
    for name, dtype, shape in tensors:
        count = math.prod(shape) * _ITEMS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, size + count]}
        size += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            stream.truncate(8 + len(text) + size)
        else:
            for _, dtype, shape in tensors:
                count = math.prod(shape) * _ITEMS[dtype]
                for begin in range(0, count, _BLOCK):
                    stream.write(_random_block(dtype)[: min(_BLOCK, count - begin)])
    return size


@functools.cache
def _random_block(dtype: str) -> memoryview:
    """Numbers whose products with their scales are near 0.02."""
    import ml_dtypes
    import numpy as np

    numbers = np.random.default_rng(0).standard_normal(_BLOCK // _ITEMS[dtype], np.float32)
    if dtype == "F32":
        return memoryview(np.full(len(numbers), 0.0002, np.float32).tobytes())
    if dtype == "F8_E4M3":
        return memoryview((numbers * 80).astype(ml_dtypes.float8_e4m3fn).tobytes())
    return memoryview((numbers * 0.02).astype(ml_dtypes.bfloat16).tobytes())
