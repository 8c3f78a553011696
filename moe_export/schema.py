"""What the parts of moe-export tell each other: plain frozen dataclasses, JSON in and out.
 ``manifest.json`` of a bundle is a :class:`Manifest`. Anything with ``shape`` uses ints for fixed and strings
for symbolic dimensions: ``batch``, ``sequence`` (new tokens), ``past`` (cached tokens), ``total`` (= past +
sequence).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Task = Literal["text-generation", "feature-extraction", "module"]
TASKS: tuple[str, ...] = typing.get_args(Task)
DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16")
"""Model dtypes. ``bfloat16`` stores weights in bfloat16 and computes in float32 where the CPU has no
kernel."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an engine.

    ``role``: ``token_ids`` (checked against ``vocab_size``), ``mask``, ``positions``, ``cache`` (input and
    output come in pairs: ``pair`` names the other one), ``data`` (anything else), ``logits``, ``hidden``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str = "data"
    pair: str | None = None


@dataclass(frozen=True)
class ModelIO:
    """Inputs and outputs, in the graph's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def cache_inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.inputs if t.role == "cache")


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of an exported model and where its values are in the graph.

    Value names hold in ``model.onnx`` of every target; a pass must keep them.
    ``hidden`` [T, H] (expert input), ``logits`` [T, E] or None, ``expert_ids`` [T, K] int32 (-1 = dropped),
    ``weights`` [T, K] float32, ``output`` [T, H] (combined expert output, before shared experts).
    """

    index: int
    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    hidden: str
    expert_ids: str
    weights: str
    output: str
    logits: str | None = None
    router: dict[str, Any] | None = None
    """Attributes of the Router op, or None where the router was left as plain nodes."""
    router_note: str = ""
    """Why a Router op is attached or not."""


@dataclass(frozen=True)
class Alternative:
    """A lowering that was not taken, and why."""

    choice: str
    reason: str
    measured_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What a pass decided for one subject (an MoE layer, a dtype, a fusion) and why."""

    subject: str
    choice: str
    reason: str
    alternatives: tuple[Alternative, ...] = ()
    measured_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceInfo:
    """Where a model came from. ``hash``: SHA-256 over config and weight files (or over the state dict)."""

    kind: Literal["huggingface", "module"]
    path: str | None
    model_type: str
    class_name: str
    hash: str
    layers: int | None = None
    """Only its first so many layers were taken (of each stack), for a trial; ``hash`` is over their weights.
    None: all."""
    all_layers: int | None = None
    """Beside ``layers``: how many the source has."""

    @property
    def trial(self) -> str:
        """One line that says what was taken of the source; empty: all of it."""
        if self.layers is None:
            return ""
        return f"a trial: the first {self.layers} of the source's {self.all_layers} layers, not all of it"


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle: path relative to it (forward slashes), size in bytes, SHA-256 in hex.

    ``block``: 0, or ``sha256`` is that of the SHA-256s (32 bytes each) of the file's blocks of so many bytes.
    """

    path: str
    size: int
    sha256: str
    block: int = 0


@dataclass(frozen=True)
class Limits:
    """The largest batch and total sequence length (past + new tokens) an engine accepts; None = unlimited."""

    max_batch: int | None = None
    max_sequence: int | None = None


@dataclass(frozen=True)
class EngineFile:
    """One plan of a TensorRT target, and what running it needs."""

    file: str
    sm: int
    """Compute capability of the only GPUs that run it: 89 is 8.9."""
    library: str
    """Python module of the runtime: ``tensorrt_rtx`` or ``tensorrt``."""
    version: str
    """Of the library that built it; the runtime's major and minor version must be the same."""
    driver: str
    """The lowest NVIDIA driver (major version) that the library runs with."""
    profiles: tuple[str, ...]
    """Optimisation profiles in order: ``decode`` and ``prefill``, or ``all``."""
    layers: int
    """Over all profiles: each has its own."""
    layer_kinds: dict[str, int]
    """Kind of TensorRT layer → how many."""
    weight_bytes: int
    activation_bytes: int
    """For the largest shapes of the profiles."""
    build_seconds: float
    rank: int = 0
    """Of an expert-parallel bundle: whose plan it is."""
    fewer_profiles: str = ""
    """Why the plan has not all profiles that were asked for, in TensorRT's words; empty: it has them."""


@dataclass(frozen=True)
class TextInfo:
    """What generation needs. ``tokenizer`` is a folder inside the bundle, or None."""

    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    tokenizer: str | None = None


EpMode = Literal["allreduce", "alltoall"]
EP_MODES: tuple[str, ...] = typing.get_args(EpMode)
EpOverflow = Literal["exact", "error"]
EP_OVERFLOWS: tuple[str, ...] = typing.get_args(EpOverflow)
PlacementKind = Literal["contiguous", "balanced"]
PLACEMENTS: tuple[str, ...] = typing.get_args(PlacementKind)


@dataclass(frozen=True)
class LayerPlacement:
    """Where the experts of one MoE layer lie. ``experts[rank]``: the source's expert of each slot of that
    rank, in the order of its weights. An expert that stands several times has replicas; each has one at
    least."""

    index: int
    experts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ExpertParallel:
    """How a bundle is divided over ranks. Rank *r* runs ``rank<r>/`` and holds only its experts; all the rest
    is in each.

    ``allreduce``: every rank gets all sequences, computes its experts, and one sum over the ranks per MoE
    layer gives the result. ``alltoall``: sequences are divided over the ranks; per MoE layer tokens go to
    their experts' ranks and back, in blocks of equal capacity.
    """

    ranks: int
    mode: EpMode
    overflow: EpOverflow = "exact"
    """Of ``alltoall``, when a block would need more room: ``exact`` makes it as large as it must be,
    ``error`` ends the run on all ranks."""
    capacity_factor: float | None = None
    """Of ``overflow`` ``error``: rows of a block over its share at even load."""
    placement: PlacementKind = "contiguous"
    redundant_experts: int = 0
    """Additional slots per MoE layer that hold replicas of its busiest experts."""
    layers: tuple[LayerPlacement, ...] = ()

    @property
    def senders(self) -> int:
        """How many ranks send one rank the tokens of sequences of their own; 1 where every rank has all."""
        return self.ranks if self.mode == "alltoall" else 1

    def folder(self, rank: int) -> str:
        """Where the files of ``rank`` lie in the bundle."""
        return f"rank{rank}"


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``."""

    source: SourceInfo
    task: str
    target: str
    dtype: str
    opset: int
    io: ModelIO
    limits: Limits
    moe_layers: tuple[MoELayer, ...]
    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()
    text: TextInfo | None = None
    quantization: str | None = None
    """``int8`` or ``int4`` when experts of at least one layer are stored so; the decisions say which."""
    cache: Literal["growing", "shared"] = "growing"
    """``growing``: the graph writes past and new entries as a new tensor. ``shared``: a cache input and its
    output may be one buffer with room for more tokens, updated in place; the past's length is the mask's
    minus the number of new tokens."""
    rows_apart: bool = False
    """Several new tokens after a past run for one sequence at a time only; the runtime does so."""
    parameters: dict[str, int] = field(default_factory=dict)
    """``total``, ``active``, ``active_without_embeddings``."""
    state: Literal["ready", "needs-gpu-build"] = "ready"
    """``needs-gpu-build``: everything but the plans; ``build_engine.py`` in the bundle finishes it on a
    machine with
    the GPU."""
    sm: tuple[int, ...] = ()
    """What plans are, or will be, for; empty for targets of the CPU."""
    engines: tuple[EngineFile, ...] = ()
    model_file: str = "model.onnx"
    """The ONNX model that runs, that plans are built from, and that is simulated. Of an expert-parallel
    bundle: that of rank 0."""
    expert_parallel: ExpertParallel | None = None
    """None: one rank has all."""
    files: tuple[FileEntry, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    """Summaries: ``parity`` and ``bench``; the whole is in ``evidence/*.json`` of the bundle."""
    created: str = ""
    schema_version: int = SCHEMA_VERSION


def to_json(value: Any) -> Any:
    """A dataclass (or container of them) as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return value


def from_json(cls: Any, data: Any, where: str = "") -> Any:
    """Rebuild ``cls`` (a dataclass of this module) from JSON values.

    Raises:
        ValueError: a field is missing, unknown or has the wrong type; the message names it.
    """
    here = where or getattr(cls, "__name__", str(cls))
    origin = typing.get_origin(cls)
    if cls is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(cls)
        if data is None and type(None) in options:
            return None
        rest = [o for o in options if o is not type(None)]
        for option in rest:
            if option in (int, str, float, bool) and type(data) is option:
                return data
        return from_json(rest[0], data, here)
    if origin is Literal:
        if data not in typing.get_args(cls):
            raise ValueError(f"{here}: expected one of {typing.get_args(cls)}, got {_shown(data)}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{here}: expected a list, got {type(data).__name__}")
        item = typing.get_args(cls)[0]
        return tuple(from_json(item, v, f"{here}[{i}]") for i, v in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{here}: expected an object, got {type(data).__name__}")
        item = typing.get_args(cls)[1]
        return {k: from_json(item, v, f"{here}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(cls):
        if not isinstance(data, dict):
            raise ValueError(f"{here}: expected an object, got {type(data).__name__}")
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise ValueError(f"{here}: unknown field {unknown[0]!r}")
        values = {}
        for name, f in fields.items():
            if name in data:
                values[name] = from_json(hints[name], data[name], f"{here}.{name}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ValueError(f"{here}: missing field {name!r}")
        assert isinstance(cls, type)
        return cls(**values)
    if cls is float and type(data) is int:
        try:
            return float(data)
        except OverflowError as error:
            raise ValueError(f"{here}: the number is too large") from error
    if type(data) is not cls:
        raise ValueError(f"{here}: expected {getattr(cls, '__name__', cls)}, got {_shown(data)}")
    return data


def _shown(data: Any) -> str:
    """A JSON value for an error message: containers by their type, long texts cut."""
    if isinstance(data, (dict, list)):
        return "an object" if isinstance(data, dict) else "a list"
    text = repr(data)
    return text if len(text) <= 80 else f"{text[:77]}..."
