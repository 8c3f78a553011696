"""The kernels as plugins of TensorRT: names, inputs, and attributes as integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_export.costs.tiles import Tile, tiles
from moe_export.errors import UsageError
from moe_export.ops.contract import Attribute

from .contract import CONTRACTS, DTYPES, KernelContract, Tensor

NAMESPACE = "moe_export_gpu"
"""Also the domain of the ONNX nodes. TensorRT allows no dot in it."""
BLOCK_ROWS = "block_rows"
"""Attribute of the plugins that share blocks: the rows BM of one, the same for a whole layer."""
SHARING = ("dispatch", "gate_up", "down")
_RENAMED = {"hidden": "hidden_size", "inner": "inner_size"}
"""Constant → attribute, where a tensor has the constant's name."""
_NAMES = {
    "router": "Router",
    "dispatch": "Dispatch",
    "gate_up": "GateUp",
    "down": "Down",
    "combine": "Combine",
}


@dataclass(frozen=True)
class AotPlugin:
    """One plugin: a kernel with a fixed list of inputs."""

    kernel: str
    biased: bool

    @property
    def contract(self) -> KernelContract:
        return CONTRACTS[self.kernel]

    @property
    def name(self) -> str:
        return _NAMES[self.kernel] + ("Bias" if self.biased else "")

    @property
    def plugin_id(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.contract.active_inputs({"biased": int(self.biased)})

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """The kernel's constants without those that its inputs tell, and the rows of a block where shared."""
        told = ("biased", "bias_dtype")
        kept = [
            replace(a, name=_RENAMED.get(a.name, a.name))
            for a in self.contract.constants
            if a.name not in told
        ]
        if self.kernel in SHARING:
            kept.append(Attribute(BLOCK_ROWS, int, "rows of a block", minimum=1))
        return tuple(kept)

    def encode(self, constants: Mapping[str, Any], block_rows: int | None = None) -> dict[str, int | float]:
        """Attributes of a node: choices as their place in the contract's list."""
        out: dict[str, int | float] = {}
        for a in self.attributes:
            if a.name == BLOCK_ROWS:
                if block_rows is None:
                    raise UsageError(f"{self.plugin_id}: {BLOCK_ROWS} is required")
                out[a.name] = block_rows
            else:
                value = constants[_constant(a.name)]
                out[a.name] = a.choices.index(value) if a.kind is str else value
        return out

    def decode(self, attributes: Mapping[str, Any], dtypes: Sequence[str]) -> dict[str, Any]:
        """The kernel's complete constants from a node's attributes and its inputs' dtypes.

        Raises:
            UsageError: a choice that does not exist, or a value outside the kernel's limits.
        """
        out: dict[str, Any] = {}
        for a in self.attributes:
            value = attributes[a.name]
            if a.kind is str and not 0 <= value < len(a.choices):
                raise UsageError(f"{self.plugin_id}: {a.name} is {value}; expected 0 to {len(a.choices) - 1}")
            if a.name != BLOCK_ROWS:
                out[_constant(a.name)] = a.choices[value] if a.kind is str else value
        if "biased" in {a.name for a in self.contract.constants}:
            out["biased"] = int(self.biased)
        if self.biased:
            out["bias_dtype"] = next(d for t, d in zip(self.inputs, dtypes, strict=True) if t.dtype == "bias")
        return self.contract.complete(out)

    def dtype(self, dtypes: Sequence[str]) -> str:
        """The dtype of the kernel from its inputs' dtypes; dispatch has none, and takes any."""
        found = {d for t, d in zip(self.inputs, dtypes, strict=True) if t.dtype == "data"}
        if len(found) > 1 or not found <= set(DTYPES):
            raise UsageError(
                f"{self.plugin_id}: activations and weights are {', '.join(sorted(found))}; expected one of "
                f"{', '.join(DTYPES)} for all"
            )
        return found.pop() if found else DTYPES[0]

    def tactics(self, dtype: str, block_rows: int | None) -> dict[int, Tile]:
        """Tactic numbers (TensorRT wants them positive) and their tiles.

        Raises:
            UsageError: there is no tile of that many rows.
        """
        every = dict(enumerate(tiles(self.kernel, dtype), start=1))
        if self.kernel not in SHARING:
            return every
        kept = {i: t for i, t in every.items() if t.rows == block_rows}
        if not kept:
            rows = sorted({t.rows for t in every.values()})
            raise UsageError(f"{self.plugin_id}: {BLOCK_ROWS} is {block_rows}; choices for {dtype}: {rows}")
        return kept


def _constant(attribute: str) -> str:
    return next((c for c, a in _RENAMED.items() if a == attribute), attribute)


PLUGINS: dict[str, AotPlugin] = {
    p.name: p
    for kernel, contract in CONTRACTS.items()
    for p in (AotPlugin(kernel, False), AotPlugin(kernel, True))
    if not p.biased or any(t.only_if == "biased" for t in contract.inputs)
}
"""By name; those with a bias are plugins of their own, since a plugin's list of inputs is fixed."""
