"""The target ``tensorrt``: plans of standard TensorRT, which times kernels on the GPU it builds for.

Without that GPU: everything up to the plan, and the script that finishes it where the GPU is.
"""

from __future__ import annotations

from ..trt.backend import TensorRtBackend

BACKEND = TensorRtBackend(
    "tensorrt",
    "TensorRT plans; without the GPU and TensorRT, all up to the plan and a script that finishes it there",
    needs_gpu=True,
)
