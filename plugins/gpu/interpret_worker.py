"""Worker process of ``interpret.py``: runs the kernels on the CPU under Triton's interpreter.

Started with ``TRITON_INTERPRET=1``, which Triton reads when a kernel is defined; so no process interprets
and compiles. Two faults of the interpreter of Triton 3.9 are repaired here, and only here: ``tl.dot``
multiplies the bit patterns of bfloat16 numbers, and conversion from float32 to bfloat16 cuts instead of
rounding to nearest even, as the hardware does.

What it does not show: TF32 (float32 products here are exact to float32), the order and precision in which
tensor cores add, shared memory, races.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.costs.tiles import Tile

from .constexprs import constexprs
from .contract import contract
from .messages import read_message, write_message

GUARD = 256
"""Elements before and after each output, which nobody may write."""


def repair_bfloat16() -> None:
    """Make the interpreter multiply and round bfloat16 as hardware does."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_dot, plain_convert = builder.create_dot, interpreter._convert_float

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, wide(a), wide(b), d, *rest)

    def convert(data: NDArray[Any], source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
            even = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            quiet = np.where(np.isnan(data), (bits >> np.uint32(16)) | np.uint32(0x40), even)
            return quiet.astype(np.uint16).reshape(data.shape)
        return plain_convert(data, source, target, rounding)

    builder.create_dot = create_dot
    interpreter._convert_float = convert


def run(request: Mapping[str, Any], arrays: Mapping[str, bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """One kernel. Answer: shapes and dtypes of the outputs, and their bytes."""
    import torch

    torch.set_num_threads(1)
    types = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32")}
    rules, tile = contract(request["kernel"]), Tile(**request["tile"])
    constants, dtype = request["constants"], request["dtype"]
    launch = rules.launch(constants, tile, request["tokens"])
    shapes = rules.input_shapes(constants, tile, request["tokens"])
    values: dict[str, Any] = {t.name: None for t in rules.inputs}
    for tensor in rules.active_inputs(constants):
        kind = types[tensor.dtype_of(dtype, constants)]
        # A tensor of no elements still needs memory to point at.
        data = torch.frombuffer(bytearray(arrays[tensor.name]) or bytearray(16), dtype=torch.uint8)
        flat = data.view(kind)
        count = int(np.prod(shapes[tensor.name]))
        values[tensor.name] = flat[: max(count, 1)]
    values |= {s.name: v for s, v in zip(rules.scalars, launch.scalars, strict=True)}
    outputs: dict[str, Any] = {}
    for tensor, shape in zip(rules.outputs, launch.output_shapes, strict=True):
        kind = types[tensor.dtype_of(dtype, constants)]
        poison = float("nan") if kind.is_floating_point else -777777777
        outputs[tensor.name] = torch.full((int(np.prod(shape)) + 2 * GUARD,), poison, dtype=kind)
        values[tensor.name] = outputs[tensor.name][GUARD:]
    module, function = request["function"]
    kernel = getattr(importlib.import_module(module), function)
    named = values | constexprs(rules.name, constants, dtype, tile)
    kernel[launch.grid](**{name: named[name] for name in kernel.arg_names})
    described, payload = [], []
    for tensor, shape in zip(rules.outputs, launch.output_shapes, strict=True):
        whole = outputs[tensor.name]
        edge = torch.cat([whole[:GUARD], whole[whole.numel() - GUARD :]])
        clean = bool(edge.isnan().all()) if edge.is_floating_point() else bool((edge == -777777777).all())
        if not clean:
            raise ValueError(f"kernel {rules.name} writes outside its output {tensor.name}")
        kind_name = tensor.dtype_of(dtype, constants)
        described.append({"name": tensor.name, "shape": list(shape), "dtype": kind_name})
        inside = whole[GUARD : whole.numel() - GUARD].contiguous()
        payload.append(inside.view(torch.uint8).numpy().tobytes() if inside.numel() else b"")
    return {"outputs": described}, payload


def main() -> int:
    """Answer requests until the input ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    repair_bfloat16()
    while (message := read_message(source)) is not None:
        request, data = message
        try:
            with np.errstate(all="ignore"):
                answer, payload = run(request, dict(zip(request["arrays"], data, strict=True)))
        except Exception as e:  # the interpreter raises errors of many kinds; the parent makes one of its own
            answer, payload = {"error": f"{type(e).__name__}: {e}"}, []
        write_message(target, answer, payload)
    return 0


if __name__ == "__main__":
    sys.exit(main())
