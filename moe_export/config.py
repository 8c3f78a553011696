"""What a build is asked to do, from a TOML file and from flags. ``docs/configuration.md`` describes the
file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_export import config_checks as checks
from moe_export.errors import UsageError, choices_text
from moe_export.files import sha256_file
from moe_export.schema import DTYPES, EP_MODES, EP_OVERFLOWS, PLACEMENTS, TASKS
from moe_export.sms import GPU_TARGETS, check_dtype, check_sms

TARGETS: tuple[str, ...] = ("onnxruntime", "portable", *GPU_TARGETS)
EXPERT_WEIGHTS: tuple[str, ...] = ("auto", "as-is", "packed")
QUANTIZATIONS: tuple[str, ...] = ("int8", "int4")
QUANTIZED_LOWERINGS: tuple[str, ...] = ("auto", "qmoe", "plugin")
CPU_LOWERINGS: tuple[str, ...] = ("auto", "fused", "unrolled", "loop")
GPU_LOWERINGS: tuple[str, ...] = ("auto", "native", "plugin")
NATIVE_LOWERINGS: tuple[str, ...] = ("auto", "gather", "buckets", "both", "dense", "trt_moe")
WEIGHTS: tuple[str, ...] = ("auto", "reference", "stream", "load")
"""``reference``: in the checkpoint's own files, which the engine shares; ``stream``: read one by one and
written anew, so that none is held in memory; ``load``: all read first, and written anew."""
EXPERT_LOWERINGS: tuple[str, ...] = tuple(dict.fromkeys((*CPU_LOWERINGS, *GPU_LOWERINGS)))
OPSETS: tuple[int, ...] = (20, 21, 22, 24)
DEFAULT_OPSET = 20
BASELINES: tuple[str, ...] = (
    "pytorch-eager",
    "torch-compile",
    "transformers-onnx",
    "transformers-onnx-fused",
)
"""Ways to run the same model without moe-export; :mod:`moe_export.bench` runs them."""
_OPSET_REASONS = {
    23: "ONNX Runtime's RotaryEmbedding of opset 23 is broken for these graphs",
}


@dataclass(frozen=True)
class BuildConfig:
    """Every choice of one build. Constructing it checks it.

    Raises:
        UsageError: a field has a wrong type or value; the message names the field and what it may be.
    """

    target: str = "onnxruntime"
    dtype: str = "float32"
    task: str | None = None
    """None: chosen from the model."""
    verify: bool = True
    bench: bool = True
    max_batch: int | None = None
    """Largest batch the engine accepts; None = unlimited."""
    max_sequence: int | None = None
    """Largest total sequence length in tokens (past and new together); None = what the model allows."""
    opset: int = DEFAULT_OPSET
    expert_lowering: str = "auto"
    """How a layer's experts are lowered; ``auto`` chooses per layer and reports why."""
    native_lowering: str = "auto"
    """Which of TensorRT's own forms a GPU target's native lowering takes; ``auto`` chooses per layer by
    predicted times."""
    expert_weights: str = "auto"
    """How the weights of fused experts lie in the bundle: as in the source, or packed for the CPU plugin."""
    sm: tuple[int, ...] | None = None
    """GPUs a TensorRT target builds for, by compute capability (89 is 8.9): one plan each; None = the GPU
    of this
    machine."""
    quantize: str | None = None
    """Store expert weights in blocks of int8 or int4, of :data:`QUANTIZATIONS`; None = as floats."""
    quantized_lowering: str = "auto"
    """What runs quantised experts: ONNX Runtime's QMoE or the CPU plugin's op; ``auto`` takes the faster one,
    per layer."""
    weights: str = "auto"
    """Where the weights of a model folder lie; see :data:`WEIGHTS`. ``auto``: not loaded where that is
    possible and they take 2 GiB or more."""
    layers: int | None = None
    """Take the first so many layers of a transformers model only, for a quick trial; None = all. Of a model
    folder, no other layer's weights are read."""
    ep: int = 1
    """Ranks that the experts are divided over; 1 = one engine holds all."""
    ep_mode: str = "allreduce"
    """How ranks exchange tokens; see :class:`moe_export.schema.ExpertParallel`."""
    ep_overflow: str = "exact"
    """What happens when a block of an all-to-all is too small."""
    ep_capacity_factor: float | None = None
    """Rows of a block over its share at even load; only with ``ep_overflow`` error."""
    placement: str = "contiguous"
    """Which rank holds which experts: in their order, or balanced by ``trace``."""
    trace: str | None = None
    """JSON file of ``moe-export trace``, for a balanced placement."""
    redundant_experts: int = 0
    """Slots per MoE layer for replicas of its busiest experts; they need a balanced placement."""
    ep_nodes: int = 1
    """Machines that the ranks lie on, for a balanced placement: groups of experts stay on one."""
    tolerances: dict[str, float] = field(default_factory=dict)
    """Output name → largest error allowed there, in place of the dtype's default."""
    seed: int = 0
    threads: int | None = None
    """Threads of the engine and of its baselines; None = all cores."""
    overwrite: bool = False
    trust_remote_code: bool = False
    """Run Python code that lies in the source folder. Never taken from a file."""
    bench_batches: tuple[int, ...] | None = None
    """Batch sizes to measure; None = the bench's own."""
    bench_sequences: tuple[int, ...] | None = None
    """Sequence lengths to measure; None = the bench's own."""
    bench_rounds: int | None = None
    """Rounds per measurement; None = the bench's own."""
    bench_baselines: tuple[str, ...] | None = None
    """What the engine is measured against, of :data:`BASELINES`; None = all."""

    def __post_init__(self) -> None:
        checks.check_choice("target", self.target, TARGETS)
        self._check_gpu()  # before the dtype alone: it says which GPUs have the dtypes that are not written
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_lowering()
        self._check_weights()
        self._check_expert_parallel()
        if self.bench and self.max_batch is not None:
            checks.check_below("bench_batches", self.bench_batches, "max_batch", self.max_batch)
        if self.bench and self.max_sequence is not None:
            checks.check_below("bench_sequences", self.bench_sequences, "max_sequence", self.max_sequence)

    def _check_gpu(self) -> None:
        """``sm``, and the dtype on each of them."""
        if self.target not in GPU_TARGETS:
            if self.sm is not None:
                raise UsageError(
                    f"sm: {self.sm!r} was given, and target {self.target} builds for no GPU; targets with "
                    "plans per "
                    f"SM: {', '.join(GPU_TARGETS)}"
                )
            return
        if self.sm is not None:
            checks.check_list("sm", self.sm, "whole numbers, as in [80, 89]")
            object.__setattr__(self, "sm", check_sms(self.target, self.sm))
        if isinstance(self.dtype, str):
            check_dtype(self.target, self.dtype, self.sm or (), DTYPES)

    def _check_lowering(self) -> None:
        own = GPU_LOWERINGS if self.target in GPU_TARGETS else CPU_LOWERINGS
        if self.expert_lowering not in own:
            others = ", ".join(t for t in TARGETS if (t in GPU_TARGETS) != (self.target in GPU_TARGETS))
            raise UsageError(
                f"expert_lowering: {self.expert_lowering} is for {others}; target {self.target} has "
                f"{', '.join(own)}"
            )
        native = self.target in GPU_TARGETS and self.expert_lowering != "plugin"
        if self.native_lowering != "auto" and not native:
            raise UsageError(
                f"native_lowering: {self.native_lowering} needs target {' or '.join(GPU_TARGETS)}, and "
                "expert_lowering auto or native"
            )
        if self.quantized_lowering != "auto" and self.quantize is None:
            raise UsageError(
                f"quantized_lowering: {self.quantized_lowering} is for quantised experts; it needs quantize"
            )

    def _check_expert_parallel(self) -> None:
        """What dividing experts over ranks needs, and what needs ranks."""
        if self.ep == 1:
            alone = BuildConfig.__dataclass_fields__
            for name in ("ep_mode", "ep_overflow", "ep_capacity_factor", "placement", "trace",
                         "redundant_experts", "ep_nodes"):  # fmt: skip
                value = getattr(self, name)
                if value != alone[name].default:
                    raise UsageError(f"{name}: {value} is for several ranks; it needs ep = 2 or more")
            return
        if self.target == "portable":
            raise UsageError(f"ep: {self.ep} needs a target that runs; portable has no collectives")
        if self.quantize is not None:
            raise UsageError(f"quantize: {self.quantize} is for one rank; leave out ep or quantize")
        if (self.ep_overflow == "error") != (self.ep_capacity_factor is not None):
            raise UsageError("ep_overflow: error and ep_capacity_factor need each other: give both or none")
        if self.ep_overflow == "error" and self.ep_mode != "alltoall":
            raise UsageError("ep_overflow: error is for ep_mode alltoall; allreduce has no blocks")
        if self.ep_overflow == "error" and self.target in GPU_TARGETS:
            raise UsageError(
                "ep_overflow: error needs target onnxruntime; blocks of a TensorRT plan have a row for every "
                "token, so none is ever too small"
            )
        if (self.placement == "balanced") != (self.trace is not None):
            raise UsageError(
                "placement: balanced and trace belong together; `moe-export trace MODEL --data FILE --json "
                "TRACE` writes one"
            )
        if self.placement == "contiguous" and (self.redundant_experts or self.ep_nodes > 1):
            raise UsageError("redundant_experts and ep_nodes need placement balanced")
        if self.ep % self.ep_nodes:
            raise UsageError(f"ep_nodes: {self.ep} ranks do not lie evenly on {self.ep_nodes} machines")

    def _check_weights(self) -> None:
        """How weights are stored: what does not go together."""
        fused = self.expert_lowering in ("auto", "fused") and self.quantize is None
        if self.expert_weights == "packed" and not (fused and self.target == "onnxruntime"):
            raise UsageError(
                "expert_weights: packed is for fused experts; it needs target onnxruntime, expert_lowering "
                "auto or fused, and no quantize"
            )
        if why := self.weights_problem(self.weights):
            raise UsageError(f"weights: {self.weights} {why}")
        if self.quantize is not None and self.target != "onnxruntime":
            raise UsageError(
                f"quantize: {self.quantize} needs target onnxruntime, which has ops for quantised "
                f"experts; target {self.target} has none"
            )

    def weights_problem(self, how: str) -> str:
        """Why weights cannot lie as ``how`` (of :data:`WEIGHTS`) says; empty when they can."""
        if how not in ("reference", "stream"):
            return ""
        if self.target in GPU_TARGETS:
            return f"needs target onnxruntime or portable; {self.target} loads them"
        if how == "reference" and self.target != "portable":
            return f"needs target portable; {self.target} lays weights out anew, which stream does"
        if self.verify:
            return "needs verify = false: verifying loads the model"
        if how == "reference" and self.bench:
            return "needs bench = false: nothing of a portable export is measured"
        if self.dtype == "float16":
            return "needs dtype float32 or bfloat16: models are traced in float16 with their weights"
        return ""

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide what a bundle holds, for :func:`moe_export.bundle.cache_key`; of a trace,
        the hash of its content.

        Raises:
            UsageError: the trace cannot be read.
        """
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "overwrite"}
        if self.trace is not None:
            try:
                values["trace"] = sha256_file(self.trace)
            except OSError as error:
                raise UsageError(f"trace: {self.trace}: {error.strerror}") from error
        return values


_PLACES: dict[str, tuple[str, str]] = {
    **{f.name: ("build", f.name) for f in dataclasses.fields(BuildConfig)},
    "tolerances": ("verify", "tolerances"),
    "bench_batches": ("bench", "batch"),
    "bench_sequences": ("bench", "sequence"),
    "bench_rounds": ("bench", "rounds"),
    "bench_baselines": ("bench", "baselines"),
}
"""Field → its table and key in a configuration file."""
_FLAG_ONLY = "trust_remote_code"


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Read a TOML configuration file.

    Returns: values by :class:`BuildConfig` field name, only those the file gives, each checked.

    Raises:
        UsageError: no such file, not TOML, an unknown table or key, a wrong value.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            document = tomllib.load(stream)
    except OSError as error:
        raise UsageError(f"configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"configuration file {path} is not valid TOML: {error}") from error

    fields = {place: name for name, place in _PLACES.items()}
    tables = {table for table, _ in fields}
    values: dict[str, Any] = {}
    for table, content in document.items():
        if not isinstance(content, dict) or table not in tables:
            hint = (
                "it belongs below a line [build]"
                if ("build", table) in fields
                else choices_text(table, tables)
            )
            raise UsageError(f"{path}: unknown table or top-level key {table!r}; {hint}")
        keys = {key for t, key in fields if t == table} - {_FLAG_ONLY}
        for key, value in content.items():
            if table == "build" and key == _FLAG_ONLY:
                raise UsageError(
                    f"{path}: {_FLAG_ONLY} is not taken from a file, because it lets code from the source "
                    "folder "
                    "run; give it as a flag or as a BuildConfig argument"
                )
            if key not in keys:
                raise UsageError(f"{path}: unknown key {key!r} in [{table}]; {choices_text(key, keys)}")
            values[fields[table, key]] = value
    for name, value in values.items():
        with _place_named(path, name):
            _CHECKS[name](name, value)
    if "target" in values:  # else a flag may name the one that all of it fits
        with _place_named(path):
            BuildConfig(**values)
    return values


def merge(file_values: Mapping[str, Any], flags: Mapping[str, Any]) -> BuildConfig:
    """One configuration from a file's values and from flags; flags win.

    A flag that is None was not given. Tolerances are merged per output.

    Raises:
        UsageError: an unknown field, or a wrong value.
    """
    known = [f.name for f in dataclasses.fields(BuildConfig)]
    for name in (*file_values, *flags):
        if name not in known:
            raise UsageError(f"unknown build option {name!r}; {choices_text(name, known)}")
    values = dict(file_values)
    values.update({name: value for name, value in flags.items() if value is not None})
    if flags.get("tolerances") and file_values.get("tolerances"):
        checks.tolerances("tolerances", flags["tolerances"])
        values["tolerances"] = {**file_values["tolerances"], **flags["tolerances"]}
    return BuildConfig(**values)


@contextmanager
def _place_named(path: Path, name: str | None = None) -> Iterator[None]:
    """Errors inside name the file and, of the field ``name`` (None: the one they begin with), its key."""
    try:
        yield
    except UsageError as error:
        text = str(error)
        name = name or text.partition(":")[0]
        if name not in _PLACES:
            raise UsageError(f"{path}: {text}") from error
        table, key = _PLACES[name]
        detail = text.removeprefix(f"{name}: ").removeprefix(f"{name} ")
        raise UsageError(f"{path}: {key} in [{table}]: {detail}") from error


_CHECKS: dict[str, checks.Check] = {
    **dict.fromkeys(("verify", "bench", "overwrite", "trust_remote_code"), checks.boolean),
    **dict.fromkeys(("max_batch", "max_sequence", "threads", "bench_rounds"), checks.optional_count),
    "layers": checks.optional_count,
    **dict.fromkeys(("bench_batches", "bench_sequences"), checks.optional_sizes),
    "target": checks.one_of(TARGETS),
    "dtype": checks.one_of(DTYPES),
    "task": checks.one_of(TASKS, optional=True),
    "opset": checks.opset_of(OPSETS, _OPSET_REASONS),
    "expert_lowering": checks.one_of(EXPERT_LOWERINGS),
    "native_lowering": checks.one_of(NATIVE_LOWERINGS),
    "expert_weights": checks.one_of(EXPERT_WEIGHTS),
    "sm": checks.optional_sms,
    "quantize": checks.one_of(QUANTIZATIONS, optional=True),
    "quantized_lowering": checks.one_of(QUANTIZED_LOWERINGS),
    "weights": checks.one_of(WEIGHTS),
    **dict.fromkeys(("ep", "ep_nodes"), checks.count),
    "ep_mode": checks.one_of(EP_MODES),
    "ep_overflow": checks.one_of(EP_OVERFLOWS),
    "ep_capacity_factor": checks.optional_factor,
    "placement": checks.one_of(PLACEMENTS),
    "trace": checks.optional_file,
    "redundant_experts": checks.at_least_zero,
    "tolerances": checks.tolerances,
    "seed": checks.seed,
    "bench_baselines": checks.optional_names(BASELINES),
}
"""Field → what checks its value by itself and gives it back, tuples in place of lists."""
