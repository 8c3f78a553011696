"""Worker process of ``compile.py``: compiles one kernel per line of its input, no GPU and no driver needed.

A process of its own, because LLVM ends the process on options it does not know, and because the interpreter
cannot live in the process that compiles. Input: one JSON request per line. Output: one JSON result per line,
on the descriptor that was standard output; what Triton prints goes to standard error.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_export.costs.tiles import Tile

from . import ptx as ptx_text
from .constexprs import constexprs
from .contract import contract
from .sm import SMS, Sm

_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32"}
_TENSOR = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA|IMMA|QMMA|OMMA)\b")


def compile_one(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Compile one request (see ``compile.py``) and describe the result as plain JSON values."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rules = contract(request["kernel"])
    constants, dtype = request["constants"], request["dtype"]
    tile, sm = Tile(**request["tile"]), SMS[request["sm"]]
    module, function = request["function"]
    kernel = getattr(importlib.import_module(module), function)

    values = constexprs(rules.name, constants, dtype, tile)
    types: dict[str, str] = {}
    active = {t.name for t in rules.active_inputs(constants)}
    for tensor in (*rules.inputs, *rules.outputs):
        if tensor.name in active or tensor in rules.outputs:
            types[tensor.name] = _POINTERS[tensor.dtype_of(dtype, constants)]
        else:
            values[tensor.name] = None
    types |= {s.name: "i32" for s in rules.scalars}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"
    }
    source = ASTSource(kernel, signature, {n: v for n, v in values.items() if n in signature}, aligned)
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "ptx_version": sm.ptx_version,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", sm.number, 32), options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"kernel {rules.name} needs scratch memory of Triton's; no adapter provides it")
    # Taken from the signature, not from the contract: a kernel that differs from its contract shows it.
    visible = sum(kind != "constexpr" for kind in signature.values())
    text = ptx_text.rename(ptx_text.strip_hidden(compiled.asm["ptx"], visible), request["entry"])
    return {
        "ptx": text,
        "shared_bytes": metadata.shared,
        "names": [name for name, kind in signature.items() if kind != "constexpr"],
        "triton": triton.__version__,
        **_assemble(text, sm, folder, rules.is_gemm),
    }


def _assemble(text: str, sm: Sm, folder: Path, count_tensor: bool) -> dict[str, Any]:
    """PTX to machine code, with what the assembler and the finished file say of it."""
    from triton.backends.nvidia.compiler import get_ptxas

    assembler = Path(get_ptxas(sm.number).path)
    source, target = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(text, encoding="ascii")
    # The register allocation level is what Triton itself asks for.
    command = [
        str(assembler),
        "-v",
        "--regAllocOptLevel=2",
        f"--gpu-name={sm.name}",
        str(source),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"ptxas ends with {done.returncode}: {done.stderr.strip()[-400:]}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    if registers is None or not spills:
        raise ValueError(f"cannot read the registers from ptxas: {done.stderr.strip()[-400:]}")
    tools = assembler.parent
    dump = subprocess.run(
        [str(tools / "cuobjdump"), "--dump-elf", str(target)], capture_output=True, text=True, check=True
    ).stdout
    sizes = dict(
        re.findall(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s+: 0x[0-9a-f]+\s+Size\s+: 0x([0-9a-f]+)", dump)
    )
    tensor: Counter[str] = Counter()
    if count_tensor:
        code = subprocess.run(
            [str(tools / "nvdisasm"), "-c", str(target)], capture_output=True, text=True, check=True
        ).stdout
        tensor = Counter(_TENSOR.findall(code))
    return {
        "cubin": base64.b64encode(target.read_bytes()).decode("ascii"),
        "registers": int(registers[1]),
        "spill_bytes": sum(int(s) for s in spills),
        "tensor_instructions": dict(tensor),
        "parameter_bytes": [int(sizes[o], 16) for o in sorted(sizes, key=lambda o: int(o, 16))],
    }


def main() -> int:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="moe-export-kernels-") as name:
        os.environ |= {"TRITON_CACHE_DIR": str(Path(name) / "triton"), "TRITON_DEFAULT_FP_FUSION": "1"}
        os.environ.pop("TRITON_INTERPRET", None)
        from triton import knobs

        knobs.compilation.disable_line_info = True
        # Triton's own assembler run is left out: the changed PTX is assembled here.
        knobs.runtime.add_stages_inspection_hook = _skip_assembler
        for line in sys.stdin:
            request = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"result": compile_one(request, Path(name))}
            except (
                Exception
            ) as e:  # Triton raises errors of many kinds; the parent makes one of its own of it
                answer = {"error": f"{type(e).__name__}: {e}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    return 0


def _skip_assembler(*arguments: Any) -> tuple[str, str] | None:
    if not arguments:
        return "moe-export", "moe-export"  # Triton's cache key of this change
    arguments[1]["cubin"] = lambda _source, _metadata: b"assembled later"
    return None


if __name__ == "__main__":
    sys.exit(main())
