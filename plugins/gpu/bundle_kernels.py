"""Writes the compiled kernels that a bundle's experts (and routers) need; ``library.py`` reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.costs.tiles import Tile, tiles
from moe_export.errors import UsageError
from moe_export.ops import DOMAIN, OPS

from .aot import Image
from .checks import require
from .compile import CompiledKernel, Request, compile_kernel, compile_kernels, triton_version
from .contract import CONTRACTS, DTYPES
from .experts import STEPS, ExpertShape, tile_sets
from .library import FORMAT, INDEX, kernel_key
from .sm import find_sm

if TYPE_CHECKING:
    import onnx_ir as ir

FOLDER = "kernels"
"""Of a bundle."""


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile."""

    kernel: str
    dtype: str
    constants: Mapping[str, Any]
    tile: Tile

    @property
    def key(self) -> str:
        return kernel_key(self.kernel, self.dtype, self.constants, self.tile)


def expert_specs(shape: ExpertShape) -> list[KernelSpec]:
    """The kernels of a layer's experts, for every tile that a launch may choose."""
    every = [(name, chosen.of(name)) for chosen in tile_sets(shape.dtype) for name in STEPS]
    every += [("combine", tile) for tile in tiles("combine", shape.dtype)]
    return [
        KernelSpec(
            # Dispatch reads and writes integers only; it is compiled once.
            name,
            DTYPES[0] if name == "dispatch" else shape.dtype,
            shape.constants(name),
            tile,
        )
        for name, tile in dict.fromkeys(every)
    ]


def router_specs(constants: Mapping[str, Any], dtype: str) -> list[KernelSpec]:
    """The kernels of a layer's router; ``constants`` are the Router op's attributes and ``num_experts``."""
    known = {a.name for a in CONTRACTS["router"].constants} | {"capacity"}
    full = CONTRACTS["router"].complete({k: v for k, v in constants.items() if k in known})
    return [KernelSpec("router", dtype, full, tile) for tile in tiles("router", dtype)]


def model_shapes(model: ir.Model, top_ks: Mapping[str, int]) -> list[ExpertShape]:
    """What the ExpertMLP nodes of a lowered model need, without repeats. ``top_ks``: K by name of the layer.

    Raises:
        UsageError: weights that are no constants, or a form that the kernels do not have.
    """
    return list({node_shape(node, top_ks): None for node in expert_nodes(model)})


def expert_nodes(model: ir.Model) -> list[ir.Node]:
    """The ExpertMLP nodes of a lowered model."""
    return [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type == "ExpertMLP"]


def node_shape(node: ir.Node, top_ks: Mapping[str, int]) -> ExpertShape:
    """What one ExpertMLP node needs; see :func:`model_shapes`."""
    own = {a.name for a in OPS["ExpertMLP"].attributes}
    attributes = {k: a.value for k, a in node.attributes.items() if k in own}
    layer = str(attributes["layer"])
    up, down = node.inputs[3], node.inputs[4]
    if up is None or down is None or up.const_value is None or down.const_value is None:
        raise UsageError(f"MoE layer {layer!r}: its expert weights are no constants of the graph")
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    sizes = down.const_value.shape.numpy()
    inner, hidden = sizes[1:] if attributes.get("transposed") else sizes[:0:-1]
    return ExpertShape.of(
        attributes,
        dtype=_name(up),
        top_k=top_ks[layer],
        hidden=hidden,
        inner=inner,
        bias_dtype=_name(bias) if bias is not None else None,
    )


def _name(value: ir.Value) -> str:
    assert value.const_value is not None  # the caller looked
    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
    dtype = value.const_value.dtype.name
    if dtype not in names:
        raise UsageError(
            f"expert weights {value.name!r} are {dtype}; the GPU kernels take {', '.join(names)}"
        )
    return names[dtype]


@dataclass(frozen=True)
class CompilerSource:
    """PTX compiled when asked for (see :class:`moe_export_plugins.gpu.aot.KernelSource`)."""

    sm: int

    def ptx(self, kernel: str, dtype: str, constants: Mapping[str, Any], tile: Tile) -> Image:
        made = require(compile_kernel(kernel, constants, dtype, self.sm, tile))
        return Image(made.entry, made.ptx, made.shared_bytes, made.parameters)


def write_kernels(folder: Path, specs: Iterable[KernelSpec], sms: Sequence[int]) -> tuple[str, ...]:
    """Compile ``specs`` for ``sms`` (compute capability times ten) and write them; needs no GPU.

    Returns the names of the written files, relative to ``folder``. Kernels that were compiled before come
    from the cache.

    Raises:
        UsageError: no kernels for an SM, or sizes outside a kernel's limits.
        EnvironmentLacksError: Triton is missing.
        ExportError: a kernel does not compile.
        CheckFailed: a compiled kernel would be slow or wrong (see ``checks.problems``); nothing is written.
    """
    wanted = list({s.key: s for s in specs}.values())
    targets = [find_sm(sm) for sm in sms]
    if not targets or not wanted:
        raise UsageError("GPU kernels: nothing to compile; name at least one kernel and one SM")
    requests = [Request(s.kernel, s.constants, s.dtype, t.name, s.tile) for s in wanted for t in targets]
    compiled = iter([require(kernel) for kernel in compile_kernels(requests)])
    folder.mkdir(parents=True, exist_ok=True)
    written, entries = [], []
    for spec in wanted:
        images: dict[str, Any] = {}
        for target in targets:
            result = next(compiled)
            images[str(target.number)] = _write(folder, result, target.number)
            written += [images[str(target.number)][kind] for kind in ("cubin", "ptx")]
        entries.append(
            {
                "kernel": spec.kernel,
                "dtype": spec.dtype,
                "constants": dict(spec.constants),
                "tile": spec.tile.to_dict(),
                "entry": result.entry,
                "parameters": list(result.parameters),
                "names": list(result.parameter_names),
                "grid": list(result.grid),
                "threads": spec.tile.threads,
                "images": images,
            }
        )
    index = {"format": FORMAT, "triton": triton_version(), "kernels": entries}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return (INDEX, *written)


def _write(folder: Path, kernel: CompiledKernel, sm: int) -> dict[str, Any]:
    place = folder / f"sm{sm}"
    place.mkdir(exist_ok=True)
    described: dict[str, Any] = {"shared": kernel.shared_bytes, "registers": kernel.registers}
    for kind, data in (("cubin", kernel.cubin), ("ptx", kernel.ptx.encode("ascii"))):
        name = f"sm{sm}/{kernel.entry}.{kind}"
        (folder / name).write_bytes(data)
        described |= {kind: name, f"{kind}_sha256": hashlib.sha256(data).hexdigest()}
    return described | {"cuda": _assembler_cuda(sm)}


@cache
def _assembler_cuda(sm: int) -> int:
    """CUDA version of the assembler that makes an SM's cubins, as major * 1000 + minor * 10."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = (int(part) for part in get_ptxas(sm).version.split(".")[:2])
    return major * 1000 + minor * 10
