"""What a compiled kernel has to fulfil before anybody uses it."""

from __future__ import annotations

import re

from moe_export.errors import CheckFailed

from .compile import CompiledKernel
from .contract import MAX_SHARED_BYTES, contract

_FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.]*\bb?f(?:16|32|64)(?:x2)?\b")


def problems(kernel: CompiledKernel) -> tuple[str, ...]:
    """Everything wrong with a compiled kernel, one line each; empty: it may be used.

    Registers must not spill to memory, dynamic shared memory must fit into 48 KiB, a GEMM must use tensor
    cores, no sum of floats may depend on the order of atomic operations, and the parameters must be those of
    the contract: by kind in the machine code, by name in the Triton function.
    """
    rules = contract(kernel.kernel)
    expected = rules.parameters(kernel.constants)
    kinds, names = tuple(k for _, k in expected), tuple(n for n, _ in expected)
    found = []
    if kernel.spill_bytes:
        found.append(f"{kernel.spill_bytes} bytes of registers are spilled; expected 0")
    if kernel.shared_bytes > MAX_SHARED_BYTES:
        found.append(
            f"{kernel.shared_bytes} bytes of dynamic shared memory; expected at most {MAX_SHARED_BYTES}"
        )
    if rules.is_gemm and not sum(kernel.tensor_instructions.values()):
        found.append("no tensor-core instruction (HMMA, HGMMA, UTCHMMA) in a matrix product")
    if atomics := sorted(set(_FLOAT_ATOMIC.findall(kernel.ptx))):
        found.append(
            f"atomic operations on floats ({', '.join(atomics)}): results would depend on their order"
        )
    if kernel.parameters != kinds:
        found.append(
            f"its parameters are {', '.join(kernel.parameters) or 'none'}; the calling convention has "
            f"{', '.join(kinds)}"
        )
    if kernel.parameter_names != names:
        found.append(
            f"its parameters are named {', '.join(kernel.parameter_names)}; the calling convention has "
            f"{', '.join(names)}"
        )
    return tuple(found)


def require(kernel: CompiledKernel) -> CompiledKernel:
    """``kernel`` itself.

    Raises:
        CheckFailed: it has problems; the message names all of them.
    """
    if found := problems(kernel):
        raise CheckFailed(
            f"GPU kernel {kernel.kernel} ({kernel.dtype}, {kernel.sm}, tile {kernel.tile}): "
            f"{'; '.join(found)}; build these experts without the plugin"
        )
    return kernel
