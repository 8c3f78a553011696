"""The target ``tensorrt-rtx``: plans for any SM of TensorRT-RTX, built ahead of time and without a GPU."""

from __future__ import annotations

from ..trt.backend import TensorRtBackend

BACKEND = TensorRtBackend(
    "tensorrt-rtx",
    "TensorRT-RTX plans, built here without a GPU; they run on GPUs of the SMs they are built for",
    needs_gpu=False,
)
