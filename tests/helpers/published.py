"""Writes a saved float model in the formats in which quantised checkpoints are published.

The float values that each format stands for are computed beside the codes, in NumPy and before any packing,
so that a reader is compared with numbers it had no part in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Array: TypeAlias = NDArray[Any]
Tensors: TypeAlias = dict[str, Array]
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LEFT = ("embed_tokens", "norm", "lm_head", "mlp.gate.", "router", "block_sparse_moe.gate.")
"""Modules that publishers leave as floats."""


@dataclass(frozen=True)
class Format:
    """``config``: what config.json says. ``write``: name and matrix → tensors of the checkpoint, and the
    matrix they stand for. ``wanted``: which tensors are quantised."""

    config: dict[str, Any]
    write: Callable[[str, Array], tuple[Tensors, Array]]
    wanted: str = r"_proj\.weight$|\.w[123]\.weight$"


def fp8(block: tuple[int, int] | None = (16, 16), scale: str = "float32") -> Format:
    """As DeepSeek-V3 and Qwen3. ``block`` None: one scale per matrix. ``scale``: float32, bfloat16, e8m0."""

    def write(name: str, matrix: Array) -> tuple[Tensors, Array]:
        rows, columns = block or matrix.shape
        grid = np.zeros((-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns)), np.float32)
        codes = np.zeros(matrix.shape, ml_dtypes.float8_e4m3fn)
        values = np.zeros(matrix.shape, np.float32)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                factor = np.float32(np.abs(matrix[part]).max() / 448)
                if scale == "e8m0":
                    factor = np.float32(2.0 ** np.ceil(np.log2(factor)))
                elif scale == "bfloat16":
                    factor = np.float32(ml_dtypes.bfloat16(factor * 1.01))
                grid[i, j] = factor
                codes[part] = (matrix[part] / factor).astype(ml_dtypes.float8_e4m3fn)
                values[part] = codes[part].astype(np.float32) * factor
        stored: Array = grid if block else grid.reshape(())
        if scale == "e8m0":
            stored = stored.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
        elif scale == "bfloat16":
            stored = stored.astype(ml_dtypes.bfloat16)
        return {name: codes, f"{name}_scale_inv": stored}, values

    config: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["weight_block_size"] = list(block) if block else None
    if scale == "e8m0":
        config["scale_fmt"] = "ue8m0"
    return Format(config, write)


def mxfp4() -> Format:
    """As gpt-oss: stacks [E, K, N] in blocks of 32 along K."""

    def write(name: str, stack: Array) -> tuple[Tensors, Array]:
        turned = np.ascontiguousarray(stack.transpose(0, 2, 1))
        experts, outputs, depth = turned.shape
        blocks = turned.reshape(experts, outputs, depth // 32, 32)
        exponent = np.floor(np.log2(np.abs(blocks).max(-1))).astype(np.int32) - 2
        scaled = blocks / (2.0 ** exponent[..., None])
        code = np.abs(np.abs(scaled)[..., None] - FP4).argmin(-1).astype(np.uint8)
        value = FP4[code] * np.sign(scaled) * (2.0 ** exponent[..., None])
        code = code | np.where(scaled < 0, 8, 0).astype(np.uint8)
        packed = code[..., 0::2] | (code[..., 1::2] << 4)
        tensors = {f"{name}_blocks": packed, f"{name}_scales": (exponent + 127).astype(np.uint8)}
        values = value.astype(np.float32).reshape(turned.shape).transpose(0, 2, 1)
        return tensors, np.ascontiguousarray(values)

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return Format(config, write, r"experts\.(gate_up|down)_proj$")


def gptq(bits: int = 4, group: int = 8, desc_act: bool = False, version: str = "gptq") -> Format:
    """AutoGPTQ's layout; ``desc_act``: inputs are assigned to groups out of order."""

    def write(name: str, matrix: Array) -> tuple[Tensors, Array]:
        outputs, depth = matrix.shape
        size = depth if group == -1 else group
        index = np.arange(depth) // size
        if desc_act:
            index = np.random.default_rng(depth).permutation(index)
        codes, scales, zeros = _asymmetric(matrix, index, bits)
        values = (codes - zeros[index].T).astype(np.float32) * scales[index].T.astype(np.float32)
        stored = zeros - 1 if version == "gptq" else zeros
        base = name.removesuffix("weight")
        tensors = {
            f"{base}qweight": _words(codes.T, bits, 0),
            f"{base}qzeros": _words(stored, bits, 1),
            f"{base}scales": scales,
            f"{base}g_idx": index.astype(np.int32),
        }
        return tensors, values

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act, "sym": False}
    return Format({**config, "checkpoint_format": version}, write)


def awq(group: int = 8) -> Format:
    """AutoAWQ's gemm layout."""

    def write(name: str, matrix: Array) -> tuple[Tensors, Array]:
        index = np.arange(matrix.shape[1]) // group
        codes, scales, zeros = _asymmetric(matrix, index, 4)
        values = (codes - zeros[index].T).astype(np.float32) * scales[index].T.astype(np.float32)
        base = name.removesuffix("weight")
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def packed(numbers: Array) -> Array:
            groups = numbers.reshape(len(numbers), -1, 8)[:, :, order]
            return _words(groups.reshape(len(numbers), -1), 4, 1)

        tensors = {f"{base}qweight": packed(codes.T), f"{base}qzeros": packed(zeros), f"{base}scales": scales}
        return tensors, values

    return Format({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}, write)


def _asymmetric(matrix: Array, index: Array, bits: int) -> tuple[Array, Array, Array]:
    """Codes [N, D], float16 scales [G, N] and zero points [G, N] in 1 to 2**bits - 1."""
    groups, most = int(index.max()) + 1, (1 << bits) - 1
    codes = np.zeros(matrix.shape, np.int64)
    scales = np.zeros((groups, len(matrix)), np.float16)
    zeros = np.zeros((groups, len(matrix)), np.int64)
    for g in range(groups):
        part = matrix[:, index == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scales[g] = ((high - low) / most).astype(np.float16)
        zeros[g] = np.clip(np.round(-low / scales[g].astype(np.float32)), 1, most)
        scaled = np.round(part / scales[g].astype(np.float32)[:, None]) + zeros[g][:, None]
        codes[:, index == g] = np.clip(scaled, 0, most)
    return codes, scales, zeros


def _words(codes: Array, bits: int, axis: int) -> Array:
    """Codes in int32 words along ``axis``, lowest bits first."""
    moved = np.moveaxis(codes.astype(np.uint32), axis, -1)
    grouped = moved.reshape(*moved.shape[:-1], -1, 32 // bits)
    words = np.zeros(grouped.shape[:-1], np.uint32)
    for place in range(32 // bits):
        words |= grouped[..., place] << np.uint32(place * bits)
    return np.ascontiguousarray(np.moveaxis(words.view(np.int32), -1, axis))


def publish(source: Path, quantised: Path, floats: Path, form: Format, shards: int = 1) -> list[str]:
    """Write the model in ``source`` to ``quantised`` in a published format, and to ``floats`` with the
    float32 values that stand there. Returns the names of the float tensors that were quantised."""
    plain, packed, names = {}, {}, []
    for name, tensor in load_file(source / "model.safetensors").items():
        left = any(part in name for part in LEFT) or not re.search(form.wanted, name)
        if left:
            packed[name] = plain[name] = tensor
            continue
        tensors, plain[name] = form.write(name, tensor.astype(np.float32))
        packed |= tensors
        names.append(name)
    config = json.loads((source / "config.json").read_text())
    _write(floats, config, plain, 1)
    _write(quantised, {**config, "quantization_config": form.config}, packed, shards)
    return names


def _write(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    places = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        save_file(part, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
