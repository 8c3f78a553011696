"""How often each expert is chosen, from runs of an engine or of a source model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from moe_export.trace import LayerTrace

PLOT_FORMATS = (".png", ".svg")


@dataclass(frozen=True)
class Spread:
    """How a number varies over windows: its median, what 95 of 100 windows stay below, and its largest."""

    p50: float
    p95: float
    max: float


def spread(loads: NDArray[Any]) -> Spread:
    """Largest over mean of each row of ``loads`` [W, N]; 1 for a row without load."""
    import numpy as np

    mean = loads.mean(axis=1)
    ratios = np.where(mean > 0, loads.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)
    return Spread(*(float(value) for value in np.percentile(ratios, (50, 95, 100))))


@dataclass(frozen=True)
class LayerUsage:
    """Choices of one MoE layer: ``counts`` int64 [E] of assignments, ``dropped`` those no expert took.

    ``weights`` float64 [E] is the sum of routing weights per expert; ``windows`` int32 [W, E] the counts of
    each window of full length.
    """

    index: int
    name: str
    counts: NDArray[np.int64]
    weights: NDArray[np.float64]
    dropped: int
    windows: NDArray[np.int32]

    @property
    def entropy(self) -> float:
        """Entropy of the choices over log E: 1 = all experts equally often, 0 = always the same one."""
        import numpy as np

        total = int(self.counts.sum())
        if total == 0 or len(self.counts) == 1:
            return 0.0
        share = self.counts[self.counts > 0] / total
        return float(-(share * np.log(share)).sum() / np.log(len(self.counts)))

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load: 1 = balanced, E = all on one."""
        total = int(self.counts.sum())
        return float(self.counts.max() * len(self.counts) / total) if total else 0.0

    @property
    def by_window(self) -> Spread:
        """Load of the busiest expert over the mean, window by window."""
        return spread(self.windows)

    def shares(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation over the windows of each expert's share of the choices, [E] each."""
        import numpy as np

        share = self.windows / np.maximum(self.windows.sum(axis=1, keepdims=True), 1)
        return share.mean(axis=0), share.std(axis=0)

    @property
    def unused(self) -> int:
        """Experts that were never chosen."""
        return int((self.counts == 0).sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        mean, deviation = self.shares()
        return {
            "index": self.index,
            "name": self.name,
            "num_experts": len(self.counts),
            "counts": [int(c) for c in self.counts],
            "mean_weight": [
                float(w / c) if c else None for w, c in zip(self.weights, self.counts, strict=True)
            ],
            "dropped": self.dropped,
            "entropy": self.entropy,
            "max_over_mean": self.max_over_mean,
            "unused": self.unused,
            "by_window": {
                "share_mean": [round(float(share), 6) for share in mean],
                "share_std": [round(float(share), 6) for share in deviation],
                "max_over_mean": asdict(self.by_window),
            },
        }


@dataclass(frozen=True)
class Usage:
    """Expert usage over some tokens. ``window``: tokens of a window of full length, of which there are
    ``windows``; a shorter one at the end counts in the sums alone."""

    tokens: int
    layers: tuple[LayerUsage, ...]
    window: int
    windows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "tokens": self.tokens,
            "window": self.window,
            "windows": self.windows,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def count_usage(runs: Iterable[tuple[LayerTrace, ...]], num_experts: tuple[int, ...]) -> Usage:
    """Add up the choices of several runs.

    ``runs``: per run its layer traces without padding tokens. ``num_experts``: E per layer, in order.

    Raises:
        InputError: no run, a run with another number of layers, or an expert id outside a layer's range.
    """
    import numpy as np

    counts = [np.zeros(e, np.int64) for e in num_experts]
    weights = [np.zeros(e, np.float64) for e in num_experts]
    dropped = [0] * len(num_experts)
    windows: list[list[NDArray[np.int32]]] = [[] for _ in num_experts]
    names: list[tuple[int, str]] = []
    sizes: list[int] = []
    for layers in runs:
        if len(layers) != len(num_experts):
            raise InputError(f"a run traced {len(layers)} MoE layers, expected {len(num_experts)}")
        names = names or [(layer.index, layer.name) for layer in layers]
        sizes.append(layers[0].expert_ids.shape[0] if layers else 0)
        for i, layer in enumerate(layers):
            ids = layer.expert_ids.reshape(-1)
            taken = ids >= 0
            if ids.size and (ids.min() < -1 or ids.max() >= num_experts[i]):
                span = f"from {ids.min()} to {ids.max()}"
                raise InputError(f"{layer.name}: expert ids {span} with {num_experts[i]} experts")
            chosen = np.bincount(ids[taken], minlength=num_experts[i])
            counts[i] += chosen
            windows[i].append(chosen.astype(np.int32))
            weights[i] += np.bincount(
                ids[taken], weights=layer.weights.reshape(-1)[taken], minlength=num_experts[i]
            )
            dropped[i] += int((~taken).sum())
    if not names:
        raise InputError("no MoE layer was traced: the text is empty, or the model has no experts")
    full = max(sizes)
    whole = [run for run, size in enumerate(sizes) if size == full]
    layers_usage = tuple(
        LayerUsage(*name, counts[i], weights[i], dropped[i], np.stack([windows[i][run] for run in whole]))
        for i, name in enumerate(names)
    )
    return Usage(sum(sizes), layers_usage, full, len(whole))


def plot_usage(usage: Usage, path: str | Path) -> None:
    """Draw a heatmap, layers × experts, of each expert's share of its layer's choices, and beside it how
    uneven the load of the windows is.

    Raises:
        UsageError: ``path`` is neither .png nor .svg.
    """
    path = check_plot_path(path)
    try:
        _figure(usage).savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"{path}: the plot cannot be written: {error.strerror}") from error


def check_plot_path(path: str | Path) -> Path:
    """``path``, if its ending names a format that :func:`plot_usage` writes.

    Raises:
        UsageError: it does not.
    """
    path = Path(path)
    if path.suffix.lower() not in PLOT_FORMATS:
        raise UsageError(f"{path}: the plot's format is told by its ending, one of {', '.join(PLOT_FORMATS)}")
    return path


def _figure(usage: Usage) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    widest = max(len(layer.counts) for layer in usage.layers)
    shares = np.full((len(usage.layers), widest), np.nan)
    for row, layer in enumerate(usage.layers):
        shares[row, : len(layer.counts)] = layer.counts / max(int(layer.counts.sum()), 1)
    rows = np.arange(len(usage.layers))
    size = (min(7 + 0.25 * widest, 24), min(2.0 + 0.3 * len(rows), 24))
    figure = Figure(figsize=size, layout="constrained")  # drawn without pyplot, so without any display
    axes, beside = figure.subplots(1, 2, sharey=True, width_ratios=(max(0.25 * widest, 3), 3))
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the layer's choices")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.set_yticks(range(len(usage.layers)), [str(layer.index) for layer in usage.layers])
    axes.set_title(f"expert usage over {usage.tokens} tokens")
    spreads = [layer.by_window for layer in usage.layers]
    low, high, most = (np.array([getattr(s, name) for s in spreads]) for name in ("p50", "p95", "max"))
    beside.barh(rows, high - low, left=low, height=0.6, color="tab:blue", alpha=0.5, label="median to 95 %")
    beside.plot(low, rows, "|", color="tab:blue", markersize=10)
    beside.plot(most, rows, ".", color="tab:red", label="largest")
    beside.set_xlim(left=1.0)
    beside.set_xlabel("busiest expert over the mean")
    beside.set_title(f"in {usage.windows} windows of {usage.window} tokens")
    beside.legend(fontsize="small")
    return figure
