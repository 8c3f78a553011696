"""Calling convention of the five GPU kernels: what an adapter has to know, and all it may rely on.

One :class:`KernelContract` per kernel, in :data:`CONTRACTS`. A MoE layer is five launches, in this order:

    router   logits [T, E]                          -> weights [T, K], expert_ids [T, K]
    dispatch expert_ids                             -> sorted_rows [NB*BM], block_expert [NB], counts [E+1]
    gate_up  hidden [T, H], up, sorted_rows, ...    -> inner [M, I]        (activation applied)
    down     inner, down, weights, sorted_rows, ... -> rows [M, H]         (routing weight applied)
    combine  rows, expert_ids                       -> out [T, H]

T tokens, E experts, K experts per token, H hidden, I inner (intermediate), M = T*K assignments; assignment
``t*K + k`` is token t's k-th choice. BM is the rows of a block: dispatch sorts the assignments by expert and
gives each expert whole blocks of BM rows. NB is the number of blocks that always suffices, from shapes alone.

Rules that hold for every kernel:

- Arguments, in this order: inputs (pointers), int32 scalars, outputs (pointers). Nothing else: the parameters
  that Triton appends are removed. Floats and all other numbers are constants, compiled in.
- Pointers are 16-byte aligned. Tensors are contiguous, the last dimension fastest.
- One launch, ``block = (32 * tile.warps, 1, 1)``, at most 48 KiB of dynamic shared memory.
- No grid dimension is 0 when T = 0, and scratch outputs have at least one block then.
- No atomics on floats: the same inputs give the same bits.
- Every element of an output is written, except rows of ``inner`` and ``rows`` whose assignment is dropped
  (expert id below 0, or E and more); no kernel reads those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_export.costs.tiles import Tile
from moe_export.errors import UsageError, choices_text
from moe_export.ops.contract import Attribute
from moe_export.ops.expert_mlp import EXPERT_MLP
from moe_export.ops.router import ROUTER

from .expressions import evaluate

DTYPES = ("float32", "float16", "bfloat16")
LIMITS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 6e-3}
"""Largest error that a kernel, and the five in a row, may have: of max |float64 reference|."""
MAX_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that a kernel may use without asking the driver for more."""

MAX_EXPERTS = 1024
MAX_MATRIX = 2**31
"""Numbers in one expert's matrix must stay below: places inside of it are int32, experts apart int64."""
MAX_ASSIGNMENTS = 2**30
"""M must stay below: the kernels number assignments and padded rows in int32."""

SYMBOLS = {"E": "num_experts", "K": "top_k", "H": "hidden", "I": "inner", "G": "gated"}
"""Symbols of shape and grid expressions that are constants."""

TILE_SYMBOLS = {"BM": "rows", "BN": "columns", "BK": "depth"}
"""Symbols that are fields of the tile."""

DERIVED = {
    "M": "T * K",
    "n": "min(E, M)",
    "NB": "max(1, (M - n) // BM + n)",
}
"""Symbols computed from T (in this order). NB: of n non-empty experts each wastes less than one block."""


@dataclass(frozen=True)
class Tensor:
    """A pointer argument. ``shape``: expressions over the symbols above. ``dtype``: ``data`` is the kernel's
    dtype, ``bias`` the constant ``bias_dtype``, otherwise the dtype itself. ``only_if``: a constant that must
    be 1, else the argument does not exist."""

    name: str
    shape: tuple[str, ...]
    dtype: str
    doc: str
    only_if: str = ""

    def dtype_of(self, dtype: str, constants: Mapping[str, Any]) -> str:
        """The numpy name of its dtype."""
        if self.dtype == "data":
            return dtype
        return str(constants["bias_dtype"]) if self.dtype == "bias" else self.dtype


@dataclass(frozen=True)
class Scalar:
    """An int32 argument and the expression of its value."""

    name: str
    value: str
    doc: str


@dataclass(frozen=True)
class Launch:
    """Numbers of one launch: grid, threads per block, values of the int32 scalars, shapes of the outputs."""

    grid: tuple[int, int, int]
    threads: int
    scalars: tuple[int, ...]
    output_shapes: tuple[tuple[int, ...], ...]

    def arguments(
        self, parameters: Sequence[tuple[str, str]], pointers: Mapping[str, int]
    ) -> list[tuple[int, bool]]:
        """(value, is a pointer) of each of the kernel's ``parameters``, in order. ``pointers``: by name."""
        scalars = iter(self.scalars)
        return [
            (pointers[name], True) if kind == "pointer" else (next(scalars), False)
            for name, kind in parameters
        ]


@dataclass(frozen=True)
class KernelContract:
    """Calling convention of one kernel.

    ``constants``: what is compiled in. ``grid``: expressions. ``tile_use``: what the tile's fields mean here.
    ``entry``: the name of the function in PTX and cubin is this plus a hash of constants, dtype and tile.
    ``is_gemm``: it multiplies matrices, so it has to use tensor cores.
    """

    name: str
    summary: str
    inputs: tuple[Tensor, ...]
    scalars: tuple[Scalar, ...]
    outputs: tuple[Tensor, ...]
    constants: tuple[Attribute, ...]
    grid: tuple[str, str, str]
    tile_use: str
    is_gemm: bool = False

    def complete(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """All constants, defaults filled in, checked against the limits of this kernel.

        Raises:
            UsageError: an unknown or missing constant, a bad value, or one outside the limits.
        """
        known = {a.name: a for a in self.constants}
        out: dict[str, Any] = {}
        for name in constants:
            if name == "capacity" and self.name == "router":
                if constants[name]:
                    raise UsageError(CAPACITY_REFUSED)
                continue
            if name not in known:
                raise UsageError(
                    f"GPU kernel {self.name}: unknown constant {name!r}; {choices_text(name, known)}"
                )
        for name, attribute in known.items():
            value = constants.get(name, attribute.default)
            if value is None:
                raise UsageError(f"GPU kernel {self.name}: constant {name!r} is required")
            out[name] = attribute.check(f"GPU kernel {self.name}", value)
        _check_limits(self.name, out)
        return out

    def active_inputs(self, constants: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The inputs that exist with these constants, in order."""
        return tuple(t for t in self.inputs if not t.only_if or constants[t.only_if])

    def parameters(self, constants: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """(name, ``pointer`` or ``int32``) of every kernel parameter, in order."""
        return (
            *((t.name, "pointer") for t in self.active_inputs(constants)),
            *((s.name, "int32") for s in self.scalars),
            *((t.name, "pointer") for t in self.outputs),
        )

    def symbols(
        self, constants: Mapping[str, Any], tile: Tile, tokens: Any, **functions: Any
    ) -> dict[str, Any]:
        """Values of all symbols for ``tokens`` (T): an int, or any object that has + - * and //.

        ``functions``: ``cdiv``, ``maximum`` and ``minimum`` for such objects (see :func:`evaluate`).
        """
        values: dict[str, Any] = {s: constants[c] for s, c in SYMBOLS.items() if c in constants}
        values |= {s: getattr(tile, f) for s, f in TILE_SYMBOLS.items()}
        values["T"] = tokens
        for symbol, text in DERIVED.items():
            values[symbol] = evaluate(text, values, **functions)
        return values

    def launch(self, constants: Mapping[str, Any], tile: Tile, tokens: int) -> Launch:
        """Everything about a launch for ``tokens`` tokens. Constants as :meth:`complete` gives them.

        Raises:
            UsageError: so many tokens that an index would not fit into int32.
        """
        if not 0 <= tokens * constants["top_k"] < MAX_ASSIGNMENTS:
            raise UsageError(
                f"GPU kernel {self.name}: {tokens} tokens x {constants['top_k']} experts; expected fewer "
                f"than {MAX_ASSIGNMENTS} assignments"
            )
        values = self.symbols(constants, tile, tokens)
        x, y, z = (int(evaluate(g, values)) for g in self.grid)
        return Launch(
            (x, y, z),
            tile.threads,
            tuple(int(evaluate(s.value, values)) for s in self.scalars),
            tuple(tuple(int(evaluate(d, values)) for d in t.shape) for t in self.outputs),
        )

    def input_shapes(
        self, constants: Mapping[str, Any], tile: Tile, tokens: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the active inputs by name; [A, B] of a transposed matrix are swapped already."""
        values = self.symbols(constants, tile, tokens)
        shapes = {}
        for t in self.active_inputs(constants):
            shape = tuple(int(evaluate(d, values)) for d in t.shape)
            if t.name in ("up", "down") and constants.get("transposed"):
                shape = (shape[0], shape[2], shape[1])
            shapes[t.name] = shape
        return shapes


CAPACITY_REFUSED = (
    "GPU kernel router: attribute capacity is not 0. An expert's places are given out in the order of all "
    "tokens of a sequence, and one launch routes the tokens in parallel, so this kernel cannot count; such "
    "a router stays plain ONNX nodes in front of dispatch, which leaves out ids of -1"
)


def _check_limits(name: str, c: Mapping[str, Any]) -> None:
    def refuse(text: str) -> None:
        raise UsageError(f"GPU kernel {name}: {text}")

    if c["num_experts"] > MAX_EXPERTS:
        refuse(f"num_experts is {c['num_experts']}; expected at most {MAX_EXPERTS}")
    if name == "router":
        # Ids of another rank's experts are larger than num_experts elsewhere, so top_k may be as well.
        if c["top_k"] > c["num_experts"]:
            refuse(f"top_k is {c['top_k']}; expected at most num_experts, {c['num_experts']}")
        if c["num_experts"] % c["n_group"]:
            refuse(f"n_group is {c['n_group']}; expected a divisor of num_experts, {c['num_experts']}")
        if c["topk_group"] > c["n_group"]:
            refuse(f"topk_group is {c['topk_group']}; expected at most n_group, {c['n_group']}")
    if "inner" in c and (1 + c.get("gated", 0)) * c["inner"] * c["hidden"] >= MAX_MATRIX:
        refuse(
            f"hidden {c['hidden']} x inner {c['inner']}; expected fewer than {MAX_MATRIX} numbers in the "
            "matrix of one expert"
        )
    if c.get("activation") == "clamped_swiglu" and not c["gated"]:
        refuse("activation clamped_swiglu needs gated 1")


def _of(attributes: tuple[Attribute, ...], *names: str) -> tuple[Attribute, ...]:
    return tuple(a for a in attributes if a.name in names)


_E = Attribute("num_experts", int, "experts E that this launch has weights of", minimum=1)
_K = Attribute("top_k", int, "experts per token K", minimum=1)
_H = Attribute("hidden", int, "hidden size H", minimum=1)
_I = Attribute("inner", int, "intermediate size I", minimum=1)
_BIAS = Attribute("bias_dtype", str, "dtype of the bias", default="float32", choices=DTYPES)
_MLP = EXPERT_MLP.attributes

_SORTED = Tensor(
    "sorted_rows", ("NB * BM",), "int32", "from dispatch: assignment of each padded row; M: none"
)
_BLOCKS = Tensor("block_expert", ("NB",), "int32", "from dispatch: expert of each block; -1 where unused")
_IDS = Tensor("expert_ids", ("T", "K"), "int32", "chosen experts; below 0 or from E on: dropped")
_ASSIGNMENTS = Scalar("M", "M", "assignments, T*K")

ROUTER_KERNEL = KernelContract(
    name="router",
    summary="scores, group limit, the K best experts of each token (equal: the lower id) and their weights",
    inputs=(
        Tensor("logits", ("T", "E"), "data", "router logits"),
        Tensor("selection_bias", ("E",), "bias", "added for selection only", only_if="biased"),
    ),
    scalars=(Scalar("T", "T", "tokens"),),
    outputs=(
        Tensor("weights", ("T", "K"), "float32", "routing weights"),
        Tensor("expert_ids", ("T", "K"), "int32", "chosen experts, by falling selection value"),
    ),
    constants=(
        _E,
        *_of(
            ROUTER.attributes,
            "top_k", "score", "renormalize", "epsilon", "scale", "n_group", "topk_group", "group_score",
            "group_mask", "biased",
        ),
        _BIAS,
    ),
    grid=("max(1, cdiv(T, BM))", "1", "1"),
    tile_use="rows = tokens per block",
)  # fmt: skip

DISPATCH_KERNEL = KernelContract(
    name="dispatch",
    summary="sorts the assignments by expert, stably by token, into whole blocks of BM rows per expert",
    inputs=(_IDS,),
    scalars=(_ASSIGNMENTS, Scalar("NB", "NB", "blocks")),
    outputs=(
        _SORTED,
        _BLOCKS,
        Tensor("counts", ("E + 1",), "int32", "assignments of each expert; last: blocks in use"),
    ),
    constants=(_E, _K),
    grid=("E", "1", "1"),
    tile_use="rows = BM of gate_up and down; columns = assignments read at once",
)

GATE_UP_KERNEL = KernelContract(
    name="gate_up",
    summary="gathers tokens, multiplies them with gate and up (or up alone) of their expert, adds the bias "
    "and applies the activation",
    inputs=(
        Tensor("hidden", ("T", "H"), "data", "tokens"),
        Tensor("up", ("E", "(1 + G) * I", "H"), "data", "gate and up, or up; [E, H, ...] when transposed"),
        Tensor("up_bias", ("E", "(1 + G) * I"), "bias", "bias of up", only_if="biased"),
        _SORTED,
        _BLOCKS,
    ),
    scalars=(_ASSIGNMENTS,),
    outputs=(Tensor("inner", ("M", "I"), "data", "activations by assignment"),),
    constants=(
        _E, _K, _H, _I,
        *_of(_MLP, "activation", "gated", "layout", "transposed", "alpha", "limit", "biased"),
        _BIAS,
    ),
    grid=("NB * cdiv(I, BN)", "1", "1"),
    tile_use="rows = BM, columns = of the result (gate and up each), depth = of H per step",
    is_gemm=True,
)  # fmt: skip

DOWN_KERNEL = KernelContract(
    name="down",
    summary="multiplies with down of the expert, adds the bias and multiplies with the routing weight",
    inputs=(
        Tensor("inner", ("M", "I"), "data", "from gate_up"),
        Tensor("down", ("E", "H", "I"), "data", "down; [E, I, H] when transposed"),
        Tensor("down_bias", ("E", "H"), "bias", "bias of down", only_if="biased"),
        Tensor("weights", ("T", "K"), "float32", "from router"),
        _SORTED,
        _BLOCKS,
    ),
    scalars=(_ASSIGNMENTS,),
    outputs=(Tensor("rows", ("M", "H"), "data", "weighted expert outputs by assignment"),),
    constants=(_E, _K, _H, _I, *_of(_MLP, "transposed", "biased"), _BIAS),
    grid=("NB * cdiv(H, BN)", "1", "1"),
    tile_use="rows = BM, columns = of the result, depth = of I per step",
    is_gemm=True,
)

COMBINE_KERNEL = KernelContract(
    name="combine",
    summary="sums each token's K rows in the order k = 0, 1, ...; dropped ones count as zero",
    inputs=(Tensor("rows", ("M", "H"), "data", "from down"), _IDS),
    scalars=(Scalar("T", "T", "tokens"),),
    outputs=(Tensor("out", ("T", "H"), "data", "sums"),),
    constants=(_E, _K, _H),
    grid=("max(1, cdiv(T, BM))", "cdiv(H, BN)", "1"),
    tile_use="rows = tokens per block, columns = of the result",
)

CONTRACTS: dict[str, KernelContract] = {
    c.name: c for c in (ROUTER_KERNEL, DISPATCH_KERNEL, GATE_UP_KERNEL, DOWN_KERNEL, COMBINE_KERNEL)
}
"""In the order they run in."""


def contract(name: str) -> KernelContract:
    """The contract of a kernel.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in CONTRACTS:
        raise UsageError(f"no GPU kernel {name!r}; {choices_text(name, CONTRACTS)}")
    return CONTRACTS[name]
