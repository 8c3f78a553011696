"""Writes docs/gpu-kernels.md from the kernels' contracts, the compiled kernels and the cost model:
python tools/generate_kernels_doc.py [--check].

No GPU is needed and none is used. Kernels that are not in the cache are compiled first, which takes minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from doc_page import ROOT, write_or_check
from moe_export_plugins.gpu.compile import CompiledKernel, compile_kernels
from moe_export_plugins.gpu.contract import (
    CAPACITY_REFUSED,
    CONTRACTS,
    DERIVED,
    LIMITS,
    MAX_ASSIGNMENTS,
    MAX_EXPERTS,
    MAX_SHARED_BYTES,
    KernelContract,
    Tensor,
)
from moe_export_plugins.gpu.matrix import HEADERS, LAYER, requests, table_row

from moe_export.costs import GPUS, Assumptions
from moe_export.costs.moe_kernels import (
    CACHE_FACTOR,
    FULL_ROWS,
    SATURATING,
    MoeShapes,
    choose_lowering,
    predict_layer,
)

PAGE = ROOT / "docs" / "gpu-kernels.md"
LAYERS = {
    "64 experts, 8 chosen, H 2048, I 1024": (64, 8, 2048, 1024),
    "8 experts, 2 chosen, H 4096, I 14336 (Mixtral 8x7B)": (8, 2, 4096, 14336),
    "256 experts, 8 chosen, H 7168, I 2048 (DeepSeek-V3)": (256, 8, 7168, 2048),
}
SHOWN = ("a100-80", "h100", "h200", "b200", "l4", "l40s", "rtx-4090", "rtx-5090")
TOKENS = (1, 8, 512, 4096)

_CAPACITY = CAPACITY_REFUSED.partition(": ")[2]
_LIMITS = [f"{dtype} {limit:.0e}".replace("e-0", "e-") for dtype, limit in LIMITS.items()]
_SHARED = f"{MAX_SHARED_BYTES // 1024} KiB"
_DERIVED = "\n".join(f"- {symbol} = `{text}`" for symbol, text in DERIVED.items())

HEAD = f"""\
# GPU kernels

Written by `tools/generate_kernels_doc.py`; a test fails when it is stale. **No kernel was run on a
GPU.** What is shown here: they compile for every SM and fulfil the checks below; under Triton's
interpreter on the CPU they agree with the ops' float64 references. Speed is *predicted*, never measured.

A MoE layer is five launches, each a Triton kernel in a file of its own (`plugins/gpu/kernels/`). They
know nothing of TensorRT; its adapters stand beside them and do no arithmetic.

- `python tools/kernel_table.py` compiles all of them, prints the table below and exits with 1 when a
  kernel spills registers, takes more than {_SHARED} of dynamic shared memory, lacks tensor-core
  instructions in a matrix product, adds floats by atomic operations, or has other parameters than its
  calling convention.
- `pytest tests/plugins/gpu` compares each kernel with its op's reference, and the five in a row with
  layers of Mixtral, DeepSeek-V3 and gpt-oss. Largest error allowed, of max |reference|: {_LIMITS[0]},
  {_LIMITS[1]}, {_LIMITS[2]}. Expert ids are equal, except where the reference itself proves a tie.
- Compiled kernels are kept in the user's cache folder (`MOE_EXPORT_KERNEL_CACHE` names another); the key
  is everything they depend on.

What the interpreter does not show: the order and precision in which tensor cores add, TF32, shared
memory, and argument passing of a real launch. float32 products run as three TF32 products of split
numbers (`tf32x3`).

## Calling convention
Arguments in this order: inputs (pointers), int32 scalars, outputs (pointers). Everything else is
compiled in. One launch, 32 x warps threads per block. T tokens, E experts, K per token, H hidden, I
inner, M = T*K; assignment t*K + k is token t's k-th choice. BM, BN: rows and columns of the tile. G: 1
with a gate, else 0. From T alone:

{_DERIVED}

NB blocks of BM rows always suffice, whatever the routing. `inner` and `rows` lie in assignment order, so
their shapes do not depend on BM. No grid is empty when T = 0. No atomics on floats: equal inputs give
equal bits.

Limits: E at most {MAX_EXPERTS}; M below 2^{MAX_ASSIGNMENTS.bit_length() - 1}; SM80 and later.

A router with capacity is refused: {_CAPACITY}.
"""


def page(kernels: Sequence[CompiledKernel]) -> str:
    """The whole page as Markdown."""
    lines = [HEAD]
    for contract in CONTRACTS.values():
        lines += _convention(contract)
    size = ", ".join(f"{name} {value}" for name, value in LAYER.items())
    lines += [
        "## Compiled kernels",
        f"For a layer with {size}, by Triton {kernels[0].triton}. Occupancy: share of a multiprocessor's",
        "warps that registers and shared memory allow, computed. HMMA: tensor cores up to SM89, of SM120,",
        "and of small tiles elsewhere; HGMMA: Hopper's; UTCHMMA: Blackwell's.",
        "",
        *_table(HEADERS, [table_row(k) for k in kernels]),
        "",
        *predictions(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _convention(contract: KernelContract) -> list[str]:
    def tensor(t: Tensor, kind: str) -> tuple[str, ...]:
        dtype = {"data": "float32, float16 or bfloat16", "bias": "`bias_dtype`"}.get(t.dtype, t.dtype)
        when = f" (only if `{t.only_if}`)" if t.only_if else ""
        return (kind, f"`{t.name}`{when}", f"[{', '.join(t.shape)}]", dtype, t.doc)

    rows = [tensor(t, "input") for t in contract.inputs]
    rows += [("scalar", f"`{s.name}`", "", "int32", s.doc) for s in contract.scalars]
    rows += [tensor(t, "output") for t in contract.outputs]
    return [
        f"### `{contract.name}`",
        f"{contract.summary[0].upper()}{contract.summary[1:]}.",
        "",
        *_table(("", "argument", "shape", "dtype", "meaning"), rows),
        "",
        f"Grid: {', '.join(f'`{g}`' for g in contract.grid)}. Tile: {contract.tile_use}.",
        f"Constants: {', '.join(f'`{c.name}`' for c in contract.constants)}.",
        "",
    ]


def predictions() -> list[str]:
    """Tables of predicted times."""
    given = Assumptions()
    lines = [
        "## Predicted times",
        "From shapes and data sheets (`moe_export/costs/moe_kernels.py`); nothing of it was measured.",
        f"bfloat16, tokens choose experts evenly. Assumed: kernels reach {given.memory:.0%} of the memory's "
        f"and {given.compute:.0%} of the",
        f"tensor cores' peak, {given.kernel_s * 1e6:g} us per launch, a second-level cache "
        f"{CACHE_FACTOR['HBM']:g} times as fast as",
        f"HBM and {CACHE_FACTOR['GDDR']:g} times as GDDR, {SATURATING:.0%} of the multiprocessors saturate",
        f"memory, tiles of fewer than {FULL_ROWS} rows reach their share of the tensor cores. Microseconds",
        "per layer for the five kernels, and in brackets the lowering that is predicted fastest where it is",
        "another one.",
        "",
    ]
    for title, (experts, top_k, hidden, inner) in LAYERS.items():
        rows = []
        for name in SHOWN:
            row = [GPUS[name].title]
            for tokens in TOKENS:
                shapes = MoeShapes(tokens, experts, top_k, hidden, inner)
                time = predict_layer(shapes, name).seconds
                best = choose_lowering(shapes, name)
                other = best.predictions[best.lowering].seconds
                better = f" ({best.lowering} {_microseconds(other)})" if best.lowering != "plugin" else ""
                row.append(_microseconds(time) + better)
            rows.append(row)
        heads = ("GPU", *(f"T = {t}" for t in TOKENS))
        lines += [f"### {title}", *_table(heads, rows), ""]
    lines += ["Data sheets: " + "; ".join(dict.fromkeys(GPUS[n].source for n in SHOWN)) + "."]
    return lines


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def main() -> int:
    """Write the page, or with ``--check`` tell whether it is fresh."""
    return write_or_check(PAGE, lambda: page(compile_kernels(requests())), __file__)


if __name__ == "__main__":
    sys.exit(main())
