"""Runs a plan in a process that has TensorRT, numpy and cuda-bindings, and nothing of moe-export.

    python -I acceptance_bare.py FOLDER      plan.engine, and inputs by name as .npy; writes out.npy

Run with ``-I``, so that nothing beside this file can be imported by accident. bfloat16 does not occur: numpy
has none.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cuda

FORBIDDEN = ("moe_export", "moe_export_plugins", "triton", "torch", "onnx")


def call(name: str, *arguments: Any) -> Any:
    error, *values = getattr(cuda, name)(*arguments)
    if int(error):
        sys.exit(f"{name} failed with {error.name}")
    return values[0] if values else None


def main(folder: Path) -> None:
    call("cudaSetDevice", 0)
    stream = call("cudaStreamCreate")
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(
        (folder / "plan.engine").read_bytes()
    )
    if engine is None:
        sys.exit("TensorRT cannot read the plan in a bare process")
    context = engine.create_execution_context()
    kind = cuda.cudaMemcpyKind
    out_name = ""
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            array = np.ascontiguousarray(np.load(folder / f"{name}.npy"))
            pointer = call("cudaMalloc", max(array.nbytes, 256))
            call("cudaMemcpy", pointer, array.ctypes.data, array.nbytes, kind.cudaMemcpyHostToDevice)
            context.set_input_shape(name, array.shape)
            context.set_tensor_address(name, int(pointer))
        else:
            out_name = name
    out = np.empty(tuple(context.get_tensor_shape(out_name)), trt.nptype(engine.get_tensor_dtype(out_name)))
    pointer = call("cudaMalloc", max(out.nbytes, 256))
    context.set_tensor_address(out_name, int(pointer))
    if not context.execute_async_v3(int(stream)):
        sys.exit("the run failed")
    call("cudaStreamSynchronize", stream)
    call("cudaMemcpy", out.ctypes.data, pointer, out.nbytes, kind.cudaMemcpyDeviceToHost)
    np.save(folder / "out.npy", out)
    loaded = sorted({m.split(".")[0] for m in sys.modules} & set(FORBIDDEN))
    if loaded:
        sys.exit(f"not bare: {', '.join(loaded)} was imported")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
