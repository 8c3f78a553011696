"""Checkpoints of published models' shapes with made-up weights.

They are laid out as save_pretrained() of transformers does: one matrix per expert where published ones have
that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARD_BYTES = 5 << 30
_ITEM = 2  # bfloat16
_BLOCK = 64 << 20


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


def write_checkpoint(
    folder: Path, model: str | dict[str, Any], layers: int | None = None, *, sparse: bool = False
) -> int:
    """Write the checkpoint; returns the bytes of its tensors.

    ``model``: a preset, or config.json. ``sparse``: the weights are holes, which read as zeros and take no
    space. Otherwise small random numbers.
    """
    config = config_of(model, layers) if isinstance(model, str) else model
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    shards = list(_shards(tensors_of(config)))
    places = {}
    total = 0
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / name, shard, sparse)
        places.update(dict.fromkeys((tensor for tensor, _ in shard), name))
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return total


def _shards(tensors: list[tuple[str, tuple[int, ...]]]) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    shard: list[tuple[str, tuple[int, ...]]] = []
    size = 0
    for name, shape in tensors:
        count = math.prod(shape) * _ITEM
        if shard and size + count > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += count
    yield shard


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], sparse: bool) -> int:
    header: dict[str, Any] = {}
    size = 0
    for name, shape in tensors:
        count = math.prod(shape) * _ITEM
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size + count]}
        size += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            stream.truncate(8 + len(text) + size)
        else:
            block = memoryview(_random_block())
            for begin in range(0, size, _BLOCK):
                stream.write(block[: min(_BLOCK, size - begin)])
    return size


def _random_block() -> bytes:
    import ml_dtypes
    import numpy as np

    numbers = np.random.default_rng(0).standard_normal(_BLOCK // _ITEM, np.float32) * 0.02
    return numbers.astype(ml_dtypes.bfloat16).tobytes()
