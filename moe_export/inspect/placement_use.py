"""How a bundle's placement of experts spreads a trace's load over its ranks, beside the contiguous one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_export.errors import UsageError
from moe_export.inspect.usage import LayerUsage, Spread, Usage, spread
from moe_export.placement import contiguous, imbalance, rank_loads
from moe_export.schema import ExpertParallel, LayerPlacement


@dataclass(frozen=True)
class RankUse:
    """Load of the busiest rank over the mean of the ranks: of all tokens, and how it varies over windows."""

    overall: float
    by_window: Spread


@dataclass(frozen=True)
class LayerPlacementUse:
    """One MoE layer. ``contiguous`` is None where there are fewer experts than ranks."""

    index: int
    contiguous: RankUse | None
    placed: RankUse


@dataclass(frozen=True)
class PlacementUse:
    """A bundle's placement on a trace."""

    bundle: str
    parallel: ExpertParallel
    layers: tuple[LayerPlacementUse, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``max_over_mean`` is of ranks."""
        return {
            "bundle": self.bundle,
            "ranks": self.parallel.ranks,
            "placement": self.parallel.placement,
            "redundant_experts": self.parallel.redundant_experts,
            "layers": [
                {
                    "index": layer.index,
                    "contiguous": _values(layer.contiguous),
                    "placed": _values(layer.placed),
                }
                for layer in self.layers
            ],
        }


def _values(use: RankUse | None) -> dict[str, Any] | None:
    if use is None:
        return None
    return {"max_over_mean": use.overall, "by_window": asdict(use.by_window)}


def parallel_of(bundle: str | Path) -> ExpertParallel | None:
    """How a bundle is divided over ranks; None for other paths and for bundles of one rank.

    Raises:
        BundleError: the manifest cannot be read.
    """
    from moe_export.bundle.manifest import MANIFEST_NAME, read_manifest

    if not (Path(bundle) / MANIFEST_NAME).is_file():
        return None
    return read_manifest(Path(bundle)).expert_parallel


def placement_use(usage: Usage, bundle: str | Path, parallel: ExpertParallel | None = None) -> PlacementUse:
    """The placement of ``bundle`` on the choices in ``usage``. No rank of it is run.

    Raises:
        BundleError: the manifest cannot be read.
        UsageError: no expert-parallel bundle, or one of a model with other layers or experts.
    """
    parallel = parallel or parallel_of(bundle)
    if parallel is None:
        raise UsageError(f"{bundle}: not an expert-parallel bundle; build one with --ep 2 or more")
    if len(parallel.layers) != len(usage.layers):
        raise UsageError(
            f"{bundle}: places the experts of {len(parallel.layers)} MoE layers, the traced model has "
            f"{len(usage.layers)}"
        )
    layers = []
    for placed, layer in zip(parallel.layers, usage.layers, strict=True):
        own = {expert for held in placed.experts for expert in held}
        if own != set(range(len(layer.counts))):
            raise UsageError(
                f"{bundle}: places {len(own)} experts in layer {placed.index}, the traced model has "
                f"{len(layer.counts)}"
            )
        before = None
        if parallel.ranks <= len(layer.counts):
            before = _use(contiguous([len(layer.counts)], parallel.ranks)[0], layer)
        layers.append(LayerPlacementUse(placed.index, before, _use(placed, layer)))
    return PlacementUse(str(bundle), parallel, tuple(layers))


def _use(placement: LayerPlacement, layer: LayerUsage) -> RankUse:
    return RankUse(imbalance(placement, layer.counts), spread(rank_loads(placement, layer.windows)))
