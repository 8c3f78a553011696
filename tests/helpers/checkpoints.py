"""Small model folders, and safetensors files with any dtype and any bit pattern."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moe_export.errors import SourceError

CONFIG = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "C64": np.complex64,
    "I64": np.int64,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
"""The files of a sharded model."""

Header = dict[str, Any]


def file_bytes(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def save(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """A safetensors file, written here so that any dtype and any bit pattern can be in it."""
    header: Header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        content = tensor.tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    path.write_bytes(file_bytes(header, data))


def make_model(folder: Path, config: object = CONFIG) -> Path:
    """A folder with one weight file of two tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save(
        folder / "model.safetensors",
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)},
    )
    return folder


def make_sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save(folder / FIRST, {"a": np.zeros((2, 3), np.float32)})
    save(folder / SECOND, {"b": np.zeros(3, np.float32)})
    weight_map = {"a": FIRST, "b": SECOND}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refusal(call: Callable[[], object], kind: type[Exception] = SourceError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)
