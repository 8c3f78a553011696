"""What a config.json says of quantised weights: which published format, with which sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_export.errors import UnsupportedModelError
from moe_export.importer.config_facts import quantized_text


@dataclass(frozen=True)
class Quantization:
    """What config.json says about the format.

    ``block``: rows and columns that share a scale of FP8; None: one scale per tensor. ``byte_scales``:
    whether scales stored as bytes are E8M0 codes. ``bits``, ``group``, ``zero_offset``: of GPTQ and AWQ; a
    ``group`` of -1 is all inputs; the offset is what a stored zero point lacks.
    """

    method: str
    block: tuple[int, int] | None = None
    byte_scales: bool = False
    bits: int = 4
    group: int = -1
    zero_offset: int = 0

    def text(self) -> str:
        """In words, for reports."""
        if self.method == "fp8":
            return f"FP8 in blocks of {self.block[0]} x {self.block[1]}" if self.block else "FP8"
        return "MXFP4" if self.method == "mxfp4" else f"{self.method.upper()} int{self.bits}"


def read_quantization(path: Path, config: Mapping[str, Any]) -> Quantization | None:
    """What a model's config says of quantised weights; None: they are floats. ``path``: its file, for
    messages.

    Raises:
        UnsupportedModelError: a method or a variant that is not read; says which are, and how to dequantise.
    """
    found = quantizations(config)
    if not found:
        return None
    if any(section != found[0] for section in found):
        raise UnsupportedModelError(f"{path}: its parts are quantised in different ways; take float weights")
    fields = found[0] if isinstance(found[0], Mapping) else {}
    method = fields.get("quant_method")
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None or config.get("compression_config"):
        raise UnsupportedModelError(f"{path}: {quantized_text(found[0])}")
    try:
        return reader(fields)
    except ValueError as error:
        raise UnsupportedModelError(f"{path}: quantization_config: {error}; take float weights") from error


def expansion(folder: Path) -> int:
    """How many times as much room as in the files the weights of a model folder take as 16-bit floats; 1 of
    a folder that is refused elsewhere."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        found = read_quantization(folder, config) if isinstance(config, dict) else None
    except (OSError, ValueError, UnsupportedModelError):
        return 1
    return 1 if found is None else 16 // (8 if found.method == "fp8" else found.bits)


def quantizations(config: Mapping[str, Any]) -> list[Any]:
    """What a config says of quantised weights, of the whole model first, then of its parts."""
    found = [config[key] for key in ("quantization_config", "compression_config") if config.get(key)]
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in ("quantization_config", "compression_config"):
            found += quantizations(value)
    return found


def _fp8(fields: Mapping[str, Any]) -> Quantization:
    if fields.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise ValueError(f"fmt {fields['fmt']!r} is not read, only e4m3")
    block = fields.get("weight_block_size", [128, 128])
    sizes = None if block is None else _sizes(block)
    return Quantization("fp8", sizes, fields.get("scale_fmt") == "ue8m0")


def _sizes(block: Any) -> tuple[int, int]:
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ValueError(f"weight_block_size {block!r} is not two sizes")
    return block[0], block[1]


def _mxfp4(_fields: Mapping[str, Any]) -> Quantization:
    return Quantization("mxfp4")


def _gptq(fields: Mapping[str, Any]) -> Quantization:
    layout = fields.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format {layout!r} is not read, only gptq and gptq_v2")
    bits = fields.get("bits")
    if bits not in (2, 4, 8):
        raise ValueError(f"bits {bits!r} are not read, only 2, 4 and 8")
    return Quantization("gptq", bits=int(bits), group=_group(fields), zero_offset=int(layout == "gptq"))


def _awq(fields: Mapping[str, Any]) -> Quantization:
    version = str(fields.get("version", "gemm")).lower()
    bits = fields.get("bits", fields.get("w_bit"))
    if version != "gemm":
        raise ValueError(f"version {version!r} is not read, only gemm")
    if bits != 4:
        raise ValueError(f"bits {bits!r} are not read, only 4")
    return Quantization("awq", group=_group(fields))


def _group(fields: Mapping[str, Any]) -> int:
    group = fields.get("group_size", fields.get("q_group_size"))
    if type(group) is not int or not (group > 0 or group == -1):
        raise ValueError(f"group_size {group!r} is neither a size nor -1")
    return group


_READERS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
}
