"""llama.cpp's ggml as a contestant: its expert product ``ggml_mul_mat_id`` over the layer's own arrays.

The library is built from a package of the Python package index, for this machine's processor:

    pip install ggml-python          (or any package that brings libggml-base and libggml-cpu)

It is found in that package, or where ``--ggml`` or the environment variable MOE_EXPORT_GGML says: a folder
with both libraries. ggml ends the process on a wrong call, so what it asserts is checked here first.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from moe_layer import Array, Inputs, Layer, LeftOut, Run, need_memory

TYPES = {"float32": 0, "bfloat16": 30}
"""ggml's numbers of element types."""
PACKAGES = ("ggml", "llama_cpp")
HOW = (
    "no libggml-base and libggml-cpu found; build them with `pip install ggml-python` into any environment, "
    "name their folder by --ggml or MOE_EXPORT_GGML"
)
SCRATCH = 16 * 2**20
"""Bytes for descriptions of tensors; their data lies elsewhere."""
_Pointer = ctypes.c_void_p


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", _Pointer), ("no_alloc", ctypes.c_bool))


def library_folder(given: str | None = None) -> Path:
    """The folder of the libraries.

    Raises:
        LeftOut: there is none; the text says how to get it.
    """
    asked = given or os.environ.get("MOE_EXPORT_GGML")
    for folder in [Path(asked)] if asked else _installed():
        if _library(folder, "ggml-base") and _library(folder, "ggml-cpu"):
            return folder
    raise LeftOut(f"{asked}: no libggml-base and libggml-cpu there" if asked else HOW)


def _installed() -> Iterator[Path]:
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from (Path(place) / "lib", Path(place))


def _library(folder: Path, name: str) -> Path | None:
    found = sorted([*folder.glob(f"lib{name}.so*"), *folder.glob(f"lib{name}.dylib")])
    return found[0] if found else None


class Ggml:
    """One graph per number of tokens and threads over weights that stay where they are."""

    names: tuple[str, ...] = ("ggml",)

    def __init__(self, layer: Layer, folder: str | None) -> None:
        self.layer = layer
        self.folder = folder
        self._library: _Functions | None = None
        self._weights: tuple[Any, Any] | None = None
        self._context: Any = None

    def make(self, name: str, inputs: Inputs, threads: int) -> Run:
        if self._library is None:
            self._library = _Functions(library_folder(self.folder))
        g, s = self._library, self.layer.shape
        if self._weights is None:
            self._context = g.context()
            kind = TYPES[self.layer.dtype]
            up = g.ggml_new_tensor_3d(self._context, kind, s.hidden, 2 * s.intermediate, s.experts)
            down = g.ggml_new_tensor_3d(self._context, kind, s.intermediate, s.hidden, s.experts)
            g.place(up, self.layer.up)
            g.place(down, self.layer.down)
            self._weights = (up, down)
        # The results of all nodes at once, at most.
        tokens = len(inputs.hidden)
        need_memory("its graph", 4 * tokens * (s.top_k * (3 * s.intermediate + 3 * s.hidden) + 4 * s.experts))
        return _Graph(g, self.layer, self._weights, inputs, threads).run


class _Graph:
    """The layer for one number of tokens, with its memory."""

    def __init__(
        self, g: _Functions, layer: Layer, weights: tuple[Any, Any], inputs: Inputs, threads: int
    ) -> None:
        s, tokens = layer.shape, len(inputs.hidden)
        self.g, self.inputs, self.shape = g, inputs, (tokens, s.hidden)
        c = g.context()
        weakref.finalize(self, g.ggml_free, c)
        up, down = weights
        self.hidden = g.ggml_new_tensor_2d(c, TYPES["float32"], s.hidden, tokens)
        self.logits = g.ggml_new_tensor_2d(c, TYPES["float32"], s.experts, tokens)
        for tensor in (self.hidden, self.logits):
            g.ggml_set_input(tensor)
        scores = g.ggml_soft_max(c, self.logits)
        ids = g.ggml_top_k(c, scores, s.top_k)
        shares = g.ggml_get_rows(c, g.ggml_reshape_3d(c, scores, 1, s.experts, tokens), ids)
        shares = g.ggml_reshape_2d(c, shares, s.top_k, tokens)
        shares = g.ggml_div(c, shares, g.ggml_sum_rows(c, shares))
        shares = g.ggml_reshape_3d(c, shares, 1, s.top_k, tokens)
        rows = g.ggml_reshape_3d(c, self.hidden, s.hidden, 1, tokens)
        active = g.ggml_swiglu(c, g.ggml_mul_mat_id(c, up, rows, ids))
        outputs = g.ggml_mul(c, g.ggml_mul_mat_id(c, down, active, ids), shares)
        width = 4 * s.hidden
        parts = [
            g.ggml_view_2d(c, outputs, s.hidden, tokens, width * s.top_k, k * width) for k in range(s.top_k)
        ]
        self.out = parts[0]
        for part in parts[1:]:
            self.out = g.ggml_add(c, self.out, part)
        g.ggml_set_output(self.out)
        self.graph = g.ggml_new_graph(c)
        g.ggml_build_forward_expand(self.graph, self.out)
        self.backend = g.ggml_backend_cpu_init()
        weakref.finalize(self, g.ggml_backend_free, self.backend)
        g.ggml_backend_cpu_set_n_threads(self.backend, threads)
        memory = g.ggml_gallocr_new(g.ggml_backend_cpu_buffer_type())
        weakref.finalize(self, g.ggml_gallocr_free, memory)
        if not g.ggml_gallocr_alloc_graph(memory, self.graph):
            raise MemoryError("ggml could not allocate its graph")

    def run(self) -> Array:
        g = self.g
        for tensor, array in ((self.hidden, self.inputs.hidden), (self.logits, self.inputs.logits)):
            ctypes.memmove(g.ggml_get_data(tensor), array.ctypes.data, array.nbytes)
        status = g.ggml_backend_graph_compute(self.backend, self.graph)
        if status != 0:
            raise RuntimeError(f"ggml: status {status}")
        data = ctypes.cast(g.ggml_get_data(self.out), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(data, self.shape)


class _Functions:
    """The functions of ggml that are used, with their types."""

    def __init__(self, folder: Path) -> None:
        libraries = []
        for name in ("ggml-base", "ggml-cpu"):
            path = _library(folder, name)
            if path is None:
                raise LeftOut(HOW)
            libraries.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
        for name, (result, *arguments) in _SIGNATURES.items():
            library = next((lib for lib in libraries if hasattr(lib, name)), None)
            if library is None:
                raise LeftOut(f"{folder}: that ggml has no {name}")
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def context(self) -> Any:
        return self.ggml_init(_Parameters(SCRATCH, None, True))

    def place(self, tensor: Any, array: Array) -> None:
        """Let ``tensor`` be the array's own memory."""
        if array.ctypes.data % 64 or not array.flags.c_contiguous:
            raise ValueError("ggml takes arrays that begin on a cache line and are contiguous")
        buffer = self.ggml_backend_cpu_buffer_from_ptr(array.ctypes.data, array.nbytes)
        self.ggml_backend_tensor_alloc(buffer, tensor, array.ctypes.data)


_I, _L, _S = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_init": (_Pointer, _Parameters),
    "ggml_free": (None, _Pointer),
    "ggml_new_tensor_2d": (_Pointer, _Pointer, _I, _L, _L),
    "ggml_new_tensor_3d": (_Pointer, _Pointer, _I, _L, _L, _L),
    "ggml_mul_mat_id": (_Pointer, _Pointer, _Pointer, _Pointer, _Pointer),
    "ggml_swiglu": (_Pointer, _Pointer, _Pointer),
    "ggml_mul": (_Pointer, _Pointer, _Pointer, _Pointer),
    "ggml_add": (_Pointer, _Pointer, _Pointer, _Pointer),
    "ggml_div": (_Pointer, _Pointer, _Pointer, _Pointer),
    "ggml_reshape_2d": (_Pointer, _Pointer, _Pointer, _L, _L),
    "ggml_reshape_3d": (_Pointer, _Pointer, _Pointer, _L, _L, _L),
    "ggml_view_2d": (_Pointer, _Pointer, _Pointer, _L, _L, _S, _S),
    "ggml_soft_max": (_Pointer, _Pointer, _Pointer),
    "ggml_top_k": (_Pointer, _Pointer, _Pointer, _I),
    "ggml_get_rows": (_Pointer, _Pointer, _Pointer, _Pointer),
    "ggml_sum_rows": (_Pointer, _Pointer, _Pointer),
    "ggml_set_input": (None, _Pointer),
    "ggml_set_output": (None, _Pointer),
    "ggml_get_data": (_Pointer, _Pointer),
    "ggml_new_graph": (_Pointer, _Pointer),
    "ggml_build_forward_expand": (None, _Pointer, _Pointer),
    "ggml_backend_cpu_init": (_Pointer,),
    "ggml_backend_free": (None, _Pointer),
    "ggml_backend_cpu_set_n_threads": (None, _Pointer, _I),
    "ggml_backend_cpu_buffer_from_ptr": (_Pointer, _Pointer, _S),
    "ggml_backend_cpu_buffer_type": (_Pointer,),
    "ggml_backend_tensor_alloc": (_I, _Pointer, _Pointer, _Pointer),
    "ggml_backend_graph_compute": (_I, _Pointer, _Pointer),
    "ggml_gallocr_new": (_Pointer, _Pointer),
    "ggml_gallocr_free": (None, _Pointer),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, _Pointer, _Pointer),
}
