"""One layer's experts as four launches: which kernels, which tiles, which scratch memory, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from typing import Any

from moe_export.costs.moe_kernels import MoeShapes, layer_tiles
from moe_export.costs.tiles import Tile, tiles
from moe_export.errors import UsageError
from moe_export.ops import OPS

from .contract import CONTRACTS, DTYPES, Launch

STEPS = ("dispatch", "gate_up", "down", "combine")
"""Kernels of one ExpertMLP node, in order. The router is a node of its own."""
SCRATCH = ("sorted_rows", "block_expert", "counts", "inner", "rows")
"""Outputs of the first three, which nobody outside sees."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}
ALIGNMENT = 256
"""Bytes; the contract asks for 16, TensorRT gives 256."""


@dataclass(frozen=True)
class ExpertShape:
    """Everything that is compiled into the kernels of an ExpertMLP node; only T changes between calls.

    ``inner``: I. The last fields are attributes of the op; ``bias_dtype`` is the dtype of both biases.

    Raises:
        UsageError: a field is of a wrong type or value, or outside the kernels' limits.
    """

    dtype: str
    num_experts: int
    top_k: int
    hidden: int
    inner: int
    activation: str = "silu"
    gated: int = 1
    layout: str = "concatenated"
    transposed: int = 0
    alpha: float = 1.702
    limit: float = 7.0
    biased: int = 0
    bias_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"ExpertMLP plugin: dtype {self.dtype!r}; choices: {', '.join(DTYPES)}")
        for name in STEPS:
            self.constants(name)

    @classmethod
    def of(
        cls,
        attributes: Mapping[str, Any],
        *,
        dtype: str,
        top_k: int,
        hidden: int,
        inner: int,
        bias_dtype: str | None = None,
    ) -> ExpertShape:
        """From a node's attributes and its inputs.

        Raises:
            UsageError: an attribute is unknown or bad, or the weights are packed for the CPU plugin.
        """
        full = OPS["ExpertMLP"].complete(attributes)
        if full["packed"]:
            raise UsageError(
                f"ExpertMLP plugin: layer {full['layer']!r} has weights packed for the CPU plugin; the GPU "
                "kernels read them as the source has them (packed 0)"
            )
        known = {f.name for f in fields(cls)}
        kept = {k: v for k, v in full.items() if k in known}
        if bias_dtype:
            kept["bias_dtype"] = bias_dtype
        return cls(dtype=dtype, top_k=top_k, hidden=hidden, inner=inner, **kept)

    def constants(self, kernel: str) -> dict[str, Any]:
        """The constants of one of :data:`STEPS`, complete and checked."""
        contract = CONTRACTS[kernel]
        given = asdict(self)
        return contract.complete({a.name: given[a.name] for a in contract.constants})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TileSet:
    """One tile per kernel. The rows of the first three are the same: they share blocks."""

    dispatch: Tile
    gate_up: Tile
    down: Tile
    combine: Tile

    def __post_init__(self) -> None:
        if not self.dispatch.rows == self.gate_up.rows == self.down.rows:
            raise UsageError(
                f"tiles of one layer: dispatch, gate_up and down have {self.dispatch.rows}, "
                f"{self.gate_up.rows} and {self.down.rows} rows; they share blocks, so these must be equal"
            )

    def of(self, kernel: str) -> Tile:
        tile: Tile = getattr(self, kernel)
        return tile


@cache
def tile_sets(dtype: str) -> tuple[TileSet, ...]:
    """The sets to choose from, by rising number of rows per block."""
    by_rows = {k: {t.rows: t for t in tiles(k, dtype)} for k in ("dispatch", "gate_up", "down")}
    shared = sorted(set.intersection(*(set(found) for found in by_rows.values())))
    few, many = tiles("combine", dtype)[0], tiles("combine", dtype)[-1]
    return tuple(
        TileSet(
            by_rows["dispatch"][rows],
            by_rows["gate_up"][rows],
            by_rows["down"][rows],
            few if rows == shared[0] else many,
        )
        for rows in shared
    )


def choose_tiles(shape: ExpertShape, tokens: int, sm: int) -> TileSet:
    """The tiles that the cost model predicts to be fastest for about ``tokens`` tokens on a GPU of ``sm``."""
    return _predicted(shape, 1 << max(tokens - 1, 0).bit_length(), sm)


@lru_cache(maxsize=1024)
def _predicted(shape: ExpertShape, tokens: int, sm: int) -> TileSet:
    best = layer_tiles(
        MoeShapes(
            tokens,
            shape.num_experts,
            # An id may be another rank's, so K may be more than the experts here.
            min(shape.top_k, shape.num_experts),
            shape.hidden,
            shape.inner,
            bool(shape.gated),
            shape.dtype,
            shape.activation,
            bool(shape.biased),
        ),
        sm,
    )
    found = next(s for s in tile_sets(shape.dtype) if s.dispatch.rows == best["dispatch"].rows)
    return replace(found, combine=best["combine"])


@dataclass(frozen=True)
class Plan:
    """The launches for one number of tokens, and where scratch tensors lie: offsets in bytes."""

    launches: tuple[tuple[str, Launch], ...]
    offsets: Mapping[str, int]
    scratch_bytes: int


@lru_cache(maxsize=1024)
def plan(shape: ExpertShape, chosen: TileSet, tokens: int) -> Plan:
    """Raises UsageError for more tokens than the kernels number in int32."""
    launches, offsets, end = [], {}, 0
    for name in STEPS:
        constants, contract = shape.constants(name), CONTRACTS[name]
        launch = contract.launch(constants, chosen.of(name), tokens)
        launches.append((name, launch))
        for tensor, sizes in zip(contract.outputs, launch.output_shapes, strict=True):
            if tensor.name in SCRATCH:
                count = 1
                for size in sizes:
                    count *= size
                offsets[tensor.name] = end
                used = count * ITEM_BYTES[tensor.dtype_of(shape.dtype, constants)]
                end += -(-used // ALIGNMENT) * ALIGNMENT
    return Plan(tuple(launches), offsets, end)


def scratch_bytes(shape: ExpertShape, tokens: int) -> int:
    """Workspace that is enough for up to ``tokens`` tokens with every set of tiles."""
    return max(plan(shape, chosen, tokens).scratch_bytes for chosen in tile_sets(shape.dtype))


def arguments(
    shape: ExpertShape, kernel: str, launch: Launch, pointers: Mapping[str, int]
) -> list[tuple[int, bool]]:
    """(value, is a pointer) of each parameter of a kernel, in its order. ``pointers``: by tensor name."""
    return launch.arguments(_parameters(shape, kernel), pointers)


@cache
def _parameters(shape: ExpertShape, kernel: str) -> tuple[tuple[str, str], ...]:
    return CONTRACTS[kernel].parameters(shape.constants(kernel))
