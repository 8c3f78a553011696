"""One MoE layer on one GPU: work and *predicted* time of the five GPU kernels and of the other lowerings.

Nothing here was run on a GPU. Tokens are taken to choose their experts evenly. A kernel's time is that of its
slowest part: memory (each weight of a chosen expert once), second-level cache (what tiles read again) or
arithmetic (padded rows included), each at the share of the machine that the kernel's blocks fill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from moe_export.costs.buckets import first_guess
from moe_export.costs.gpus import GPUS, Gpu, find_gpu
from moe_export.costs.roofline import Assumptions, Time, predict
from moe_export.costs.routing import Popularity
from moe_export.costs.tiles import GEMMS, KERNELS, TILES, Tile, tiles
from moe_export.costs.work import Work
from moe_export.errors import UsageError, choices_text

CACHE_FACTOR = {"HBM": 2.5, "GDDR": 5.0}
"""Bandwidth of the second-level cache over that of memory: no data sheet tells it, so an assumption."""
FULL_ROWS = 64
"""Rows of a tile that keep tensor cores busy; fewer reach their share of the peak. An assumption."""
_GDDR_SMS = (75, 86, 89, 120, 121)
SATURATING = 0.5
"""Share of the multiprocessors that can draw the whole bandwidth: an assumption."""
LOWERINGS = ("plugin", "gather", "buckets", "dense", "trt_moe")
LAUNCHES = {"gather": 4, "buckets": 14, "dense": 5, "trt_moe": 2}
"""Kernels per layer after TensorRT's fusions, without routing: an assumption."""
ROUTING_LAUNCHES = 4
"""Of a router in plain nodes: score, top-k, normalisation, casts. An assumption."""
GATHER_TOKENS = 8
"""Up to so many tokens (E/K, if more) TensorRT was seen to fuse the gather: no weight is copied."""
TRT_MOE_SMS = (100, 103, 110)
TRT_MOE_TOKENS = 16
"""``TRT_MOE`` is slow for longer sequences (NVIDIA's documentation)."""
GPU_OF_SM = {
    75: "l4", 80: "a100-80", 86: "l4", 89: "l40s", 90: "h100", 100: "b200", 103: "b200", 110: "l4",
    120: "rtx-5090", 121: "rtx-5090",
}  # fmt: skip
"""A GPU of each SM whose data sheet is here; of the nearest SM where there is none."""


@dataclass(frozen=True)
class MoeShapes:
    """One MoE layer and the tokens of one run. ``each`` token chooses ``top_k`` of ``experts``; of a rank
    that holds a part of the layer, ``top_k`` of ``routed_over``, of which ``experts`` are here."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    gated: bool = True
    dtype: str = "bfloat16"
    activation: str = "silu"
    biased: bool = False
    routed_over: int = 0
    """Experts of all ranks; 0: all are here."""

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "hidden", "inner"):
            if getattr(self, name) < 1:
                raise UsageError(f"MoE layer: {name} is {getattr(self, name)}; expected 1 or more")
        if self.tokens < 0:
            raise UsageError(f"MoE layer: tokens is {self.tokens}; expected 0 or more")
        if self.top_k > self.everywhere:
            raise UsageError(f"MoE layer: top_k is {self.top_k}; expected at most experts, {self.everywhere}")
        if self.dtype not in TILES["gate_up"]:
            raise UsageError(f"MoE layer: dtype {self.dtype!r}; {choices_text(self.dtype, TILES['gate_up'])}")

    @property
    def everywhere(self) -> int:
        """Experts of all ranks."""
        return max(self.routed_over, self.experts)

    @property
    def assignments(self) -> int:
        return self.tokens * self.top_k

    @property
    def wide(self) -> int:
        """Rows of the up matrix."""
        return self.inner * (2 if self.gated else 1)

    @property
    def each(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def expert_weights(self) -> int:
        """Numbers in one expert's matrices."""
        return self.hidden * (self.wide + self.inner)

    @property
    def touched(self) -> float:
        """Expected number of experts here that at least one token chooses."""
        everywhere = Popularity.uniform(self.everywhere, self.top_k).touched(self.tokens)
        return everywhere * self.experts / self.everywhere

    def blocks(self, rows: int) -> float:
        """Expected number of blocks of ``rows`` rows of one expert each."""
        blocks = expected_blocks(self.tokens, self.top_k, self.everywhere, rows)
        return blocks * self.experts / self.everywhere


@dataclass(frozen=True)
class KernelWork:
    """Work of one launch; ``cached``: bytes through the second-level cache, ``blocks``: those with rows."""

    work: Work
    cached: float
    blocks: float


@dataclass(frozen=True)
class LayerPrediction:
    """*Predicted* time of a layer's routing and experts, by kernel. ``chosen``: tiles of the five kernels."""

    lowering: str
    gpu: str
    times: Mapping[str, Time]
    chosen: Mapping[str, Tile] = field(default_factory=dict)
    label: str = "predicted"

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in self.times.values())


@dataclass(frozen=True)
class LoweringChoice:
    """``predictions`` by lowering (those that are possible); ``refused``: why the others are not."""

    lowering: str
    reason: str
    predictions: Mapping[str, LayerPrediction]
    refused: Mapping[str, str]
    label: str = "predicted"


def gpu_for(gpu_or_sm: Gpu | str | int) -> Gpu:
    """A GPU, its name, or an SM (``90``, ``"sm_90a"``), for which a GPU of it is taken.

    Raises:
        UsageError: neither a GPU nor an SM that is known.
    """
    if isinstance(gpu_or_sm, Gpu):
        return gpu_or_sm
    text = str(gpu_or_sm).lower()
    digits = text.removeprefix("sm").removeprefix("_").rstrip("a")
    if digits.isdigit():
        if int(digits) not in GPU_OF_SM:
            choices = ", ".join(str(s) for s in GPU_OF_SM)
            raise UsageError(f"no GPU of SM {gpu_or_sm!r}; choices: {choices}")
        return GPUS[GPU_OF_SM[int(digits)]]
    return find_gpu(text)


@lru_cache(maxsize=1024)
def expected_blocks(tokens: int, top_k: int, experts: int, rows: int) -> float:
    """Expected number of blocks of ``rows`` rows when each expert's rows are padded to whole blocks."""
    chance = top_k / experts
    mean = tokens * chance
    if chance >= 1:
        return float(experts * -(-tokens // rows))
    if mean > 16 * rows:
        return experts * (mean / rows + 0.5)
    log_p, log_q = math.log(chance), math.log1p(-chance)
    total = 0.0
    # Beyond it nothing weighs: twelve standard deviations.
    for count in range(1, min(tokens, int(mean + 12 * math.sqrt(mean) + 12)) + 1):
        ways = math.lgamma(tokens + 1) - math.lgamma(count + 1) - math.lgamma(tokens - count + 1)
        probability = math.exp(ways + count * log_p + (tokens - count) * log_q)
        total += probability * -(-count // rows)
    return experts * total


def kernel_work(kernel: str, shapes: MoeShapes, tile: Tile) -> KernelWork:
    """Bytes, operations and blocks of one launch.

    Raises:
        UsageError: no kernel of that name.
    """
    s = shapes
    t, m, each = s.tokens, s.assignments, s.each
    if kernel == "router":
        traffic = float(t * s.experts * each + m * 8)
        return KernelWork(
            Work(t * s.experts * (10.0 + 4.0 * s.top_k), 0, 0, traffic), traffic, -(-t // tile.rows)
        )
    if kernel == "dispatch":
        blocks = s.blocks(tile.rows)
        cached = 2.0 * s.experts * m * 4 + blocks * (tile.rows + 1) * 4
        traffic = m * 4.0 + blocks * (tile.rows + 1) * 4
        return KernelWork(Work(12.0 * s.experts * m, 0, 0, traffic), cached, s.experts)
    if kernel in GEMMS:
        depth, out = (s.hidden, s.inner) if kernel == "gate_up" else (s.inner, s.hidden)
        wide = s.wide if kernel == "gate_up" else out
        blocks = s.blocks(tile.rows)
        across = -(-out // tile.columns)
        source = t if kernel == "gate_up" else m
        return KernelWork(
            Work(
                flops=2.0 * blocks * tile.rows * depth * wide,
                weights=s.touched * depth * wide * each,
                activations=float((source * depth + m * out) * each),
            ),
            cached=blocks * depth * (across * tile.rows + wide) * each + m * out * each,
            blocks=blocks * across,
        )
    if kernel == "combine":
        traffic = float((m + t) * s.hidden * each + m * 4)
        blocks = float(-(-t // tile.rows) * -(-s.hidden // tile.columns))
        return KernelWork(Work(float(m * s.hidden), 0, 0, traffic), traffic, blocks)
    raise UsageError(f"no GPU kernel {kernel!r}; {choices_text(kernel, KERNELS)}")


def predict_kernel(
    kernel: str, shapes: MoeShapes, tile: Tile, gpu: Gpu, assumptions: Assumptions | None = None
) -> Time:
    """*Predicted* time of one launch."""
    given = assumptions or Assumptions()
    found = kernel_work(kernel, shapes, tile)
    if found.blocks <= 0:
        return Time(overhead=given.kernel_s)
    rounds = math.ceil(found.blocks / gpu.multiprocessors)
    busy = found.blocks / (rounds * gpu.multiprocessors)
    drawing = min(1.0, found.blocks / (SATURATING * gpu.multiprocessors))
    bandwidth = gpu.bandwidth * given.memory * drawing
    cache = bandwidth * CACHE_FACTOR["GDDR" if gpu.sm in _GDDR_SMS else "HBM"]
    traffic = max(found.work.bytes / bandwidth, found.cached / cache)
    reached = min(1.0, tile.rows / FULL_ROWS) if kernel in GEMMS else 1.0
    arithmetic = found.work.flops / (_peak(kernel, shapes.dtype, gpu) * given.compute * busy * reached)
    if arithmetic > traffic:
        return Time(compute=arithmetic, overhead=given.kernel_s)
    return Time(memory=traffic, overhead=given.kernel_s)


def _peak(kernel: str, dtype: str, gpu: Gpu) -> float:
    if kernel not in GEMMS:
        return gpu.peak("float32")
    # float32: three TF32 products, each at half the speed of 16 bits.
    return gpu.peak("bfloat16") / (6.0 if dtype == "float32" else 1.0)


def layer_tiles(shapes: MoeShapes, gpu_or_sm: Gpu | str | int) -> dict[str, Tile]:
    """The tile of each kernel with the least *predicted* time. Rows of dispatch, gate_up and down agree."""
    gpu = gpu_for(gpu_or_sm)

    def best(kernel: str, rows: int | None) -> tuple[float, Tile]:
        known = [t for t in tiles(kernel, shapes.dtype) if rows is None or t.rows == rows]
        times = [(predict_kernel(kernel, shapes, t, gpu).seconds, i) for i, t in enumerate(known)]
        seconds, index = min(times)
        return seconds, known[index]

    shared = ("dispatch", "gate_up", "down")
    options = []
    for rows in sorted(set.intersection(*({t.rows for t in tiles(k, shapes.dtype)} for k in shared))):
        found = {k: best(k, rows) for k in shared}
        options.append((sum(seconds for seconds, _ in found.values()), rows, found))
    chosen = min(options, key=lambda o: o[:2])[2]
    picked = {k: tile for k, (_, tile) in chosen.items()}
    return {k: picked[k] if k in picked else best(k, None)[1] for k in KERNELS}


def choose_tiles(kernel: str, shapes: MoeShapes, gpu_or_sm: Gpu | str | int) -> Tile:
    """The tile of one kernel, chosen for the whole layer (:func:`layer_tiles`).

    Raises:
        UsageError: no such kernel, GPU or SM.
    """
    if kernel not in KERNELS:
        raise UsageError(f"no GPU kernel {kernel!r}; {choices_text(kernel, KERNELS)}")
    return layer_tiles(shapes, gpu_or_sm)[kernel]


def predict_layer(
    shapes: MoeShapes,
    gpu_or_sm: Gpu | str | int,
    lowering: str = "plugin",
    assumptions: Assumptions | None = None,
) -> LayerPrediction:
    """*Predicted* time of one layer by one lowering; whether the lowering is possible is not asked.

    Raises:
        UsageError: no such lowering, GPU or SM.
    """
    gpu, given = gpu_for(gpu_or_sm), assumptions or Assumptions()
    if lowering not in LOWERINGS:
        raise UsageError(f"no lowering {lowering!r}; {choices_text(lowering, LOWERINGS)}")
    if lowering == "plugin":
        chosen = layer_tiles(shapes, gpu)
        times = {k: predict_kernel(k, shapes, chosen[k], gpu, given) for k in KERNELS}
        return LayerPrediction(lowering, gpu.name, times, chosen)
    routing = predict(
        kernel_work("router", shapes, tiles("router", shapes.dtype)[0]).work,
        gpu,
        "float32",
        given,
        ROUTING_LAUNCHES,
    )
    work, compute = native_work(shapes, lowering)
    experts = predict(work, gpu, compute, given, LAUNCHES[lowering])
    return LayerPrediction(lowering, gpu.name, {"routing": routing, "experts": experts})


def native_work(shapes: MoeShapes, lowering: str) -> tuple[Work, str]:
    """Work of the experts without the five kernels, and the number format it is multiplied in.

    ``gather`` reads the matrices of every assignment and multiplies element by element; ``buckets`` computes
    every expert on as many rows as the host chose; ``dense`` computes every expert on every token.
    """
    s = shapes
    m = float(s.assignments)
    compute = "float32" if s.dtype == "float32" else "bfloat16"
    rows, matrices = m, s.touched
    if lowering == "gather":
        matrices, compute = m, "float32"
    elif lowering == "buckets":
        rows = float(s.experts * first_guess(s.tokens, s.top_k, s.everywhere)) if s.tokens else 0.0
        matrices = float(s.experts)
    elif lowering == "dense":
        rows, matrices = float(s.experts * s.tokens), float(s.experts)
    width = 2 * s.hidden + s.wide + s.inner
    work = Work(
        flops=2.0 * rows * s.expert_weights,
        weights=matrices * s.expert_weights * s.each,
        activations=(rows * width + 2.0 * m * s.hidden) * s.each,
    )
    return work, compute


def refusals(shapes: MoeShapes, sm: int) -> dict[str, str]:
    """Lowerings that are not for this layer, these tokens or this SM, and why."""
    found = {}
    if sm < 80:
        found["plugin"] = f"its kernels are compiled for SM80 and later, not for SM{sm}"
    most = max(GATHER_TOKENS, shapes.everywhere // shapes.top_k)
    if shapes.tokens > most:
        found["gather"] = f"for up to {most} tokens; each assignment reads its expert's matrices again"
    if sm not in TRT_MOE_SMS:
        found["trt_moe"] = f"TensorRT's MoE layer exists on SM100, SM103 and SM110, not on SM{sm}"
    elif shapes.activation != "silu" or not shapes.gated or shapes.biased:
        found["trt_moe"] = "TensorRT's MoE layer has SiLU-gated experts without biases only"
    elif shapes.tokens > TRT_MOE_TOKENS:
        found["trt_moe"] = f"TensorRT's MoE layer is slow for more than {TRT_MOE_TOKENS} tokens"
    return found


def choose_lowering(
    shapes: MoeShapes, gpu_or_sm: Gpu | str | int, available: Sequence[str] = LOWERINGS
) -> LoweringChoice:
    """The possible lowering with the least *predicted* time, and the others' times or why they are refused.

    ``available``: what the target offers at all.

    Raises:
        UsageError: an unknown lowering, GPU or SM, or none that is possible.
    """
    for name in available:
        if name not in LOWERINGS:
            raise UsageError(f"no lowering {name!r}; {choices_text(name, LOWERINGS)}")
    gpu = gpu_for(gpu_or_sm)
    refused = refusals(shapes, _sm_of(gpu_or_sm, gpu))
    refused |= {name: "not offered by this target" for name in LOWERINGS if name not in available}
    known = {name: predict_layer(shapes, gpu, name) for name in LOWERINGS if name not in refused}
    if not known:
        raise UsageError("no lowering is possible: " + "; ".join(f"{n}: {why}" for n, why in refused.items()))
    best = min(known, key=lambda name: (known[name].seconds, LOWERINGS.index(name)))
    times = ", ".join(f"{n} {p.seconds * 1e6:.3g} us" for n, p in known.items())
    reason = f"predicted for {gpu.title} at {shapes.tokens} tokens, not measured: {times}"
    return LoweringChoice(best, reason, known, refused)


def _sm_of(gpu_or_sm: Gpu | str | int, gpu: Gpu) -> int:
    digits = str(gpu_or_sm).lower().removeprefix("sm").removeprefix("_").rstrip("a")
    return int(digits) if digits.isdigit() else gpu.sm
