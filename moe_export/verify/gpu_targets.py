"""What verification means for targets whose engines run on a GPU only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..backends.trt.profiles import make_profiles, require_covered
from ..config import BuildConfig
from ..schema import Limits, Manifest
from .inputs import make_cases

if TYPE_CHECKING:
    from ..importer.export import ExportedModel


def require_covered_inputs(exported: ExportedModel, config: BuildConfig, limits: Limits) -> None:
    """Refuse limits whose profiles lack a shape that verification uses, before plans are built.

    Raises:
        UsageError: names the input, the limits and how to change them.
    """
    loaded = exported.source
    manifest = Manifest(
        source=loaded.info,
        task=loaded.task,
        target=config.target,
        dtype=config.dtype,
        opset=config.opset,
        io=exported.io,
        limits=limits,
        moe_layers=exported.moe_layers,
        text=loaded.text,
    )
    cases, _ = make_cases(manifest, seed=config.seed)
    profiles = make_profiles(exported.io, limits, split=False)
    require_covered(profiles, ((c.name, {n: v.shape for n, v in c.inputs.items()}) for c in cases))


def not_done(config: BuildConfig) -> tuple[str, ...]:
    """What the evidence of a build does not show, a line each."""
    if config.verify:
        parity = "checked by simulation: the lowered graph ran on the CPU, no plan ran on a GPU"
    else:
        parity = "not verified; `moe-export verify BUNDLE --simulate` runs the lowered graph on the CPU"
    return (parity, "not measured: a plan's speed shows on its GPU only")
