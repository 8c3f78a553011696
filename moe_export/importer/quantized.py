"""Which tensors of a quantised checkpoint stand for which float weights, without reading one.

To the rest of the importer such a checkpoint is one of float tensors: each has the name and the shape that it
has in the float checkpoint, and is computed when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moe_export.errors import SourceError, UnsupportedModelError
from moe_export.importer.dequantize import MXFP4_BLOCK
from moe_export.importer.quantized_config import Quantization

if TYPE_CHECKING:
    import torch

    from moe_export.importer.checkpoint import CheckpointInfo

_SCALE = "_scale_inv"


class Stored(Protocol):
    """What is needed of a tensor of the checkpoint."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class QuantizedTensor:
    """A float tensor that the checkpoint holds as several others.

    ``parts``: role → name in the checkpoint. ``dtype``: the narrowest that holds every value exactly, as
    safetensors names it. ``nbytes``: of the parts. ``stack``: length of the first axis where matrices are
    stacked along it in every part, else 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, str]
    nbytes: int
    stack: int
    formula: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]

    @property
    def float_bytes(self) -> int:
        """Bytes that the float values take in ``dtype``."""
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The float tensor, of its parts by role, or a piece of it, of pieces along the first axis.

        Raises:
            SourceError: values of the parts make no sense; names the tensor.
        """
        import torch

        try:
            made = self.formula(parts)
        except SourceError as error:
            raise SourceError(f"tensor {self.parts['weight']!r}: {error}; take a sound checkpoint") from error
        if not bool(torch.isfinite(made).all()):
            count = int((~torch.isfinite(made)).sum())
            raise SourceError(
                f"tensor {self.parts['weight']!r}: {count} values are NaN or infinite once they are scaled "
                f"by {self.parts['scale']!r}; take a sound checkpoint"
            )
        return made


@dataclass(frozen=True)
class QuantizedWeights:
    """All quantised tensors of a checkpoint, for reports.

    ``text``: the format. ``nbytes``: of the parts in the checkpoint. ``elements``, ``float_bytes``: of the
    float tensors, the latter in the narrowest dtypes that hold their values exactly.
    """

    text: str
    tensors: int
    nbytes: int
    elements: int
    float_bytes: int

    def written_bytes(self, dtype: str) -> int:
        """What the float tensors take in a model of ``dtype`` that is written from the checkpoint."""
        return self.float_bytes if dtype == "float32" else self.elements * 2

    @classmethod
    def of(cls, checkpoint: CheckpointInfo) -> QuantizedWeights | None:
        """Of a checkpoint; None where no tensor is quantised."""
        if checkpoint.quantization is None or not checkpoint.quantized:
            return None
        found = checkpoint.quantized.values()
        return cls(
            checkpoint.quantization.text(),
            len(found),
            sum(tensor.nbytes for tensor in found),
            sum(math.prod(tensor.shape) for tensor in found),
            sum(tensor.float_bytes for tensor in found),
        )


def quantized_tensors(
    folder: Path, format: Quantization | None, tensors: Mapping[str, Stored]
) -> dict[str, QuantizedTensor]:
    """The float tensors that ``tensors`` stand for, by the name they have in a float checkpoint.

    Raises:
        SourceError: a scale, zero point or weight is missing or of a wrong shape. UnsupportedModelError: a
        tensor of small floats or packed integers that nothing says how to scale. Both name the tensor.
    """
    found: dict[str, QuantizedTensor] = {}
    if format is not None:
        finder = _Finder(folder, format, tensors)
        make = {"fp8": finder.fp8, "mxfp4": finder.mxfp4}.get(format.method, finder.integers)
        for name in tensors:
            made = make(name)
            if made is None:
                continue
            if made.name in tensors and made.name != name:
                raise SourceError(f"{folder}: holds {made.name!r} and its quantised form {name!r}")
            found[made.name] = made
        finder.refuse_orphans(found)
    used = {part for tensor in found.values() for part in tensor.parts.values()}
    for name, tensor in tensors.items():
        if name not in used and (tensor.dtype.startswith(("F8", "F6", "F4")) or name.endswith(".qweight")):
            says = "quantization_config does not say" if format else "config.json has no quantization_config"
            how = "how to scale it" if format else "that says how to scale it"
            raise UnsupportedModelError(
                f"{folder}: tensor {name!r} is {tensor.dtype}, and {says} {how}; take the float checkpoint"
            )
    return found


@dataclass(frozen=True)
class _Finder:
    folder: Path
    format: Quantization
    tensors: Mapping[str, Stored]

    def fp8(self, name: str) -> QuantizedTensor | None:
        weight = self.tensors[name]
        if weight.dtype != "F8_E4M3":
            return None
        block = self.format.block
        scale = self._part(name + _SCALE, name)
        wanted: tuple[int, ...] = ()
        if block is not None:
            if len(weight.shape) < 2:
                raise SourceError(
                    f"{self.folder}: tensor {name!r} of shape {list(weight.shape)} is no matrix"
                )
            *stack, rows, columns = weight.shape
            wanted = (*stack, -(-rows // block[0]), -(-columns // block[1]))
            self._check(name + _SCALE, wanted)
        elif math.prod(scale.shape) != 1:
            self._check(name + _SCALE, wanted)
        dtypes = ("F32", "BF16", "F16", "F8_E8M0", *(("U8",) if self.format.byte_scales else ()))
        if scale.dtype not in dtypes:
            raise SourceError(
                f"{self.folder}: tensor {name + _SCALE!r} is {scale.dtype}, expected {', '.join(dtypes)}"
            )
        stacked = weight.shape[0] if block is not None and len(weight.shape) == 3 else 0

        def formula(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
            from .dequantize import fp8_blocks

            return fp8_blocks(parts["weight"], parts["scale"], block)

        parts = {"weight": name, "scale": name + _SCALE}
        return self._made(name, weight.shape, "F32", parts, stacked, formula)

    def mxfp4(self, name: str) -> QuantizedTensor | None:
        base = name.removesuffix("_blocks")
        blocks = self.tensors[name]
        if base == name:
            return None
        if blocks.dtype != "U8" or len(blocks.shape) < 3 or blocks.shape[-1] != MXFP4_BLOCK // 2:
            raise SourceError(
                f"{self.folder}: tensor {name!r} is {blocks.dtype} {list(blocks.shape)}, expected U8 and "
                f"{MXFP4_BLOCK // 2} bytes per block"
            )
        self._part(f"{base}_scales", name, "U8")
        self._check(f"{base}_scales", blocks.shape[:-1])
        *stack, outputs, groups, _ = blocks.shape

        def formula(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
            from .dequantize import mxfp4

            return mxfp4(parts["weight"], parts["scale"])

        parts = {"weight": name, "scale": f"{base}_scales"}
        shape = (*stack, groups * MXFP4_BLOCK, outputs)
        return self._made(base, shape, "BF16", parts, stack[0] if len(stack) == 1 else 0, formula)

    def integers(self, name: str) -> QuantizedTensor | None:
        base = name.removesuffix(".qweight")
        weight = self.tensors[name]
        if base == name:
            return None
        if weight.dtype != "I32" or len(weight.shape) != 2:
            raise SourceError(f"{self.folder}: tensor {name!r} is no matrix of I32")
        per_word = 32 // self.format.bits
        gptq = self.format.method == "gptq"
        depth, outputs = (weight.shape[0] * (per_word if gptq else 1), weight.shape[1])
        outputs *= 1 if gptq else per_word
        size = depth if self.format.group == -1 else self.format.group
        groups = -(-depth // size)
        parts = {"weight": name, "zero": f"{base}.qzeros", "scale": f"{base}.scales"}
        self._part(parts["zero"], name, "I32")
        self._part(parts["scale"], name, "F16", "BF16", "F32")
        self._check(parts["zero"], (groups, -(-outputs // per_word)))
        self._check(parts["scale"], (groups, outputs))
        if outputs % per_word or (not gptq and depth % size):
            raise SourceError(
                f"{self.folder}: tensor {name!r}: {depth} inputs and {outputs} outputs do not fill groups of "
                f"{size} and words of {per_word} codes"
            )
        if gptq and f"{base}.g_idx" in self.tensors:
            parts["group"] = f"{base}.g_idx"
            self._part(parts["group"], name, "I32")
            self._check(parts["group"], (depth,))
        bits, offset = self.format.bits, self.format.zero_offset

        def formula(held: Mapping[str, torch.Tensor]) -> torch.Tensor:
            import torch

            from .dequantize import awq
            from .dequantize import gptq as read_gptq

            if not gptq:
                return awq(held["weight"], held["zero"], held["scale"])
            group = held.get("group")
            group = torch.arange(depth) // size if group is None else group
            return read_gptq(held["weight"], held["zero"], held["scale"], group, bits, offset)

        return self._made(f"{base}.weight", (outputs, depth), "F32", parts, 0, formula)

    def refuse_orphans(self, found: Mapping[str, QuantizedTensor]) -> None:
        """A scale whose weight is missing, or is a float, says that something is wrong."""
        endings = {"fp8": (_SCALE,), "mxfp4": ("_blocks", "_scales")}
        used = {part for tensor in found.values() for part in tensor.parts.values()}
        for name in self.tensors:
            if name not in used and name.endswith(endings.get(self.format.method, (".qzeros", ".scales"))):
                raise SourceError(
                    f"{self.folder}: tensor {name!r} scales no quantised weight: that is missing, or a "
                    "float; copy the checkpoint again"
                )

    def _part(self, name: str, of: str, *dtypes: str) -> Stored:
        part = self.tensors.get(name)
        if part is None:
            raise SourceError(
                f"{self.folder}: tensor {of!r} is quantised and {name!r}, which it is scaled by, is missing; "
                "copy the checkpoint again"
            )
        if dtypes and part.dtype not in dtypes:
            wanted = " or ".join(dtypes)
            raise SourceError(f"{self.folder}: tensor {name!r} is {part.dtype}, expected {wanted}")
        return part

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        held = self.tensors[name].shape
        if held != shape:
            raise SourceError(
                f"{self.folder}: tensor {name!r} has the shape {list(held)}, expected {list(shape)} "
                f"({self.format.text()}); correct quantization_config, or copy the checkpoint again"
            )

    def _made(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        parts: Mapping[str, str],
        stack: int,
        formula: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    ) -> QuantizedTensor:
        nbytes = sum(self.tensors[part].nbytes for part in parts.values())
        return QuantizedTensor(name, shape, dtype, parts, nbytes, stack, formula)
