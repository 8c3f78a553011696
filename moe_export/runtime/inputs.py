"""Inputs of an engine, checked and completed before ONNX Runtime sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import InputError, choices_text
from moe_export.runtime.tensors import numpy_dtype
from moe_export.schema import Limits, ModelIO, TensorSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class CheckedInputs:
    """Inputs that fit the engine: every input by name, and the size of every symbolic dimension."""

    feeds: dict[str, Array]
    dims: dict[str, int]


class InputChecker:
    """Checks inputs against an engine's declared inputs, limits and vocabulary.

    Names, dtypes (integers may widen), ranks, fixed dimensions, symbolic dimensions over all inputs, limits,
    token ids, masks and positions. Cache inputs may be left out together: a past of length 0 is supplied. A
    left-out mask means no padding; left-out positions count the unmasked tokens, as Hugging Face models do.
    """

    def __init__(self, io: ModelIO, limits: Limits, vocab_size: int | None) -> None:
        self._io = io
        self._limits = limits
        self._vocab_size = vocab_size
        self._specs = {spec.name: spec for spec in io.inputs}
        self._caches = {spec.name for spec in io.cache_inputs}

    def check(self, inputs: Mapping[str, Any]) -> CheckedInputs:
        """Check and complete ``inputs``.

        Raises:
            InputError: the first thing that does not fit, with the input's name and what was expected.
        """
        self._check_names(inputs)
        feeds = {name: as_array(self._specs[name], value) for name, value in inputs.items()}
        dims = self._bind_dims(feeds)
        self._check_limits(dims)
        for name, array in feeds.items():
            self._check_values(self._specs[name], array)
        self._complete(feeds, dims)
        return CheckedInputs(feeds, dims)

    def _check_names(self, inputs: Mapping[str, Any]) -> None:
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"inputs are a {type(inputs).__name__}; expected a dict from input names to arrays"
            )
        for name in inputs:
            if name not in self._specs:
                raise InputError(f"unknown input {name!r}; {choices_text(str(name), self._specs)}")
        absent = [spec for spec in self._io.inputs if spec.name not in inputs]
        caches = [spec.name for spec in absent if spec.role == "cache"]
        if caches and len(caches) != len(self._caches):
            raise InputError(
                f"cache input {caches[0]!r} is missing while others are given; give all {len(self._caches)} "
                "or none"
            )
        for spec in absent:
            if spec.role == "cache" or (spec.role in ("mask", "positions") and len(spec.shape) == 2):
                continue
            shape = ", ".join(str(dim) for dim in spec.shape)
            raise InputError(f"input {spec.name!r} ({spec.dtype} [{shape}]) is missing")

    def _bind_dims(self, feeds: dict[str, Array]) -> dict[str, int]:
        dims: dict[str, int] = {}
        first: dict[str, str] = {}
        for spec in self._io.inputs:
            if spec.name not in feeds:
                continue
            shape = feeds[spec.name].shape
            if len(shape) != len(spec.shape):
                raise InputError(f"input {spec.name!r} has shape {list(shape)}; expected {_shape_text(spec)}")
            for axis, (size, want) in enumerate(zip(shape, spec.shape, strict=True)):
                here = f"axis {axis} of {spec.name!r}"
                if isinstance(want, int):
                    if size != want:
                        raise InputError(f"{here} is {size}; expected {want} (shape {_shape_text(spec)})")
                elif want in dims and dims[want] != size:
                    raise InputError(f"{here} ({want}) is {size}, but {first[want]} is {dims[want]}")
                else:
                    dims.setdefault(want, size)
                    first.setdefault(want, here)
        for symbol in ("batch", "sequence"):
            if dims.get(symbol) == 0:
                raise InputError(f"{symbol} is 0 ({first[symbol]}); expected at least 1")
        if "sequence" in dims and any(
            "past" in spec.shape or "total" in spec.shape for spec in self._io.inputs
        ):
            past = dims.setdefault("past", 0)
            total = past + dims["sequence"]
            if dims.setdefault("total", total) != total:
                raise InputError(
                    f"{first['total']} (total) is {dims['total']}; expected past {past} + sequence "
                    f"{dims['sequence']} = {total}"
                )
        return dims

    def _check_limits(self, dims: dict[str, int]) -> None:
        batch, most = dims.get("batch", 0), self._limits.max_batch
        if most is not None and batch > most:
            raise InputError(
                f"batch of {batch} is beyond the bundle's maximum {most}; rebuild with --max-batch"
            )
        for symbol, size in dims.items():
            if symbol == "total" or symbol.endswith("sequence"):
                check_sequence(size, dims.get("past", 0) if symbol == "total" else 0, self._limits)

    def _check_values(self, spec: TensorSpec, array: Array) -> None:
        if spec.role == "token_ids" and self._vocab_size is not None:
            check_token_ids(array, self._vocab_size, spec.name)
        if spec.role == "mask" and array.dtype.kind in "iu":
            _refuse_where((array != 0) & (array != 1), spec.name, array, "expected 0 (padding) or 1 (token)")
        if spec.role == "positions":
            _refuse_where(array < 0, spec.name, array, "positions are 0 or more")

    def _complete(self, feeds: dict[str, Array], dims: dict[str, int]) -> None:
        masks: dict[int | str, Array] = {}
        for spec in self._io.inputs:
            if spec.role == "mask":
                if spec.name not in feeds:
                    feeds[spec.name] = np.ones(_resolve(spec, dims), numpy_dtype(spec.dtype))
                masks.setdefault(spec.shape[-1], feeds[spec.name])
        for spec in self._io.inputs:
            if spec.name in feeds:
                continue
            shape = _resolve(spec, dims)
            dtype = numpy_dtype(spec.dtype)
            mask = masks.get("total", masks.get(spec.shape[-1]))
            if spec.role == "cache":
                feeds[spec.name] = np.zeros(shape, dtype)
            elif mask is not None:
                feeds[spec.name] = positions_of(mask)[:, mask.shape[1] - shape[1] :].astype(dtype)
            else:
                past = dims.get("past", 0)
                feeds[spec.name] = np.broadcast_to(
                    np.arange(past, past + shape[1], dtype=dtype), shape
                ).copy()


def positions_of(mask: Array) -> NDArray[np.int64]:
    """Positions [batch, length] int64 from a mask [batch, length]: unmasked tokens counted from 0, padding at
    0.
    """
    return np.maximum(np.cumsum(mask != 0, axis=1, dtype=np.int64) - 1, 0)


def check_batch(batch: int, limits: Limits) -> None:
    """Raise :class:`InputError` if ``batch`` sequences are beyond the limits."""
    most = limits.max_batch
    if most is not None and batch > most:
        raise InputError(f"batch of {batch} is beyond the bundle's maximum {most}; rebuild with --max-batch")


def check_sequence(total: int, past: int, limits: Limits) -> None:
    """Raise :class:`InputError` if ``total`` tokens (``past`` cached ones included) are beyond the limits."""
    most = limits.max_sequence
    if most is not None and total > most:
        parts = f" (past {past} + new {total - past})" if past else ""
        raise InputError(
            f"sequence of {total} tokens{parts} is beyond the bundle's maximum {most}; rebuild with --max-seq"
        )


def check_token_ids(ids: Array, vocab_size: int, name: str) -> None:
    """Raise :class:`InputError` naming the first id of the array ``ids`` that is outside the vocabulary."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        _refuse_where((ids < 0) | (ids >= vocab_size), name, ids, f"the vocabulary is 0 to {vocab_size - 1}")


def as_array(spec: TensorSpec, value: Any) -> Array:
    """``value`` as a C-contiguous array of the declared dtype.

    Arrays (NumPy, or anything with ``__array__``) keep their meaning: the same dtype, or integers and
    booleans that widen without loss. Lists have no dtype of their own, so whole numbers and floats are taken
    as declared.

    Raises:
        InputError: the dtype does not fit.
    """
    want = numpy_dtype(spec.dtype)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"input {spec.name!r} is not an array: {error}") from error
    if array.dtype != want:
        typed = hasattr(value, "dtype")
        integers = array.dtype.kind in "iub" and want.kind in "iu"
        fits = integers and np.can_cast(array.dtype, want, "safe")
        if not typed and not fits:
            fits = array.size == 0 or (array.dtype.kind in "iuf" and want.kind in "fV")
        if not typed and integers and not fits and array.size:
            limits = np.iinfo(want)
            fits = bool(array.min() >= limits.min and array.max() <= limits.max)
        if not fits:
            raise InputError(f"input {spec.name!r} has dtype {array.dtype}; expected {spec.dtype}")
        array = array.astype(want)
    return np.ascontiguousarray(array) if array.ndim else array


def _refuse_where(bad: NDArray[np.bool_], name: str, array: Array, rule: str) -> None:
    if bad.any():
        position = tuple(int(axis[0]) for axis in np.nonzero(bad))
        raise InputError(f"{name}{list(position)} is {array[position]}; {rule}")


def _resolve(spec: TensorSpec, dims: dict[str, int]) -> tuple[int, ...]:
    missing = [dim for dim in spec.shape if isinstance(dim, str) and dim not in dims]
    if missing:
        raise InputError(
            f"input {spec.name!r} is missing, and its {missing[0]} does not follow from the others"
        )
    return tuple(dim if isinstance(dim, int) else dims[dim] for dim in spec.shape)


def _shape_text(spec: TensorSpec) -> str:
    return "[" + ", ".join(str(dim) for dim in spec.shape) + "]"
