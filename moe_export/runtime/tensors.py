"""NumPy arrays as ONNX Runtime values and back, bfloat16 included, without copies where that is possible."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import InputError, choices_text

if TYPE_CHECKING:
    import onnxruntime as ort

Array = NDArray[Any]

_NUMPY_NAMES = tuple(
    np.dtype(kind).name for kind in (bool, "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
)
_ORT_NAMES = {"float32": "float", "float64": "double"}
_ONNX_BFLOAT16 = 16


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype for a dtype name of a manifest.

    Raises:
        InputError: the name is not one of the dtypes an engine can take.
    """
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if name not in _NUMPY_NAMES:
        raise InputError(f"dtype {name!r} is unknown; {choices_text(name, [*_NUMPY_NAMES, 'bfloat16'])}")
    return np.dtype(name)


def ort_type_name(name: str) -> str:
    """How ONNX Runtime spells the tensor type of a dtype name: ``tensor(float)`` for ``float32``."""
    return f"tensor({_ORT_NAMES.get(name, name)})"


def to_ort(array: Array) -> ort.OrtValue:
    """An ONNX Runtime value over the memory of a C-contiguous ``array`` (which it keeps alive)."""
    import onnxruntime as ort

    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def to_numpy(value: ort.OrtValue) -> Array:
    """The value as an array: a view of ONNX Runtime's memory that keeps it alive, or for bfloat16 a copy."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, dtype=numpy_dtype("bfloat16")).reshape(value.shape())
