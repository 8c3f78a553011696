"""Who runs in a benchmark: the engine and its baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .exported_runner import FUSED, PLAIN, ExportedRunner, TransformersExport
from .result import EAGER, ENGINE
from .runner import Runner
from .torch_runner import CompiledRunner, TorchRunner

COMPILE = "torch-compile"
EXPORT, EXPORT_FUSED = "transformers-onnx", "transformers-onnx-fused"
EXPORTER = "transformers-exporter"
"""Not a contestant: the one export that :data:`EXPORT` and :data:`EXPORT_FUSED` run."""


@dataclass(frozen=True)
class Baseline:
    """A way to run the source model without moe-export.

    ``needs``: memory it takes while it gets ready, in float32 model sizes; ``first_seconds``: the longest
    its first run may take.
    """

    name: str
    title: str
    needs: float
    first_seconds: float = 300.0


BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline(EAGER, "PyTorch eager, the transformers model as it loads", 1.3),
        Baseline(COMPILE, "PyTorch through torch.compile, dynamic shapes", 1.6, 420.0),
        Baseline(EXPORT, "transformers' own ONNX export in ONNX Runtime", 4.0),
        Baseline(EXPORT_FUSED, "the same with transformers' fusions for ONNX Runtime on the CPU", 4.0),
    )
}
ENGINE_TITLE = "moe-export engine (this bundle)"


def make_runner(spec: dict[str, Any]) -> Runner:
    """The runner that ``spec`` describes: ``kind`` and the arguments of its class.

    Raises:
        ValueError: an unknown kind.
    """
    from .engine_runner import EngineRunner

    values = dict(spec)
    kind = values.pop("kind")
    kinds: dict[str, type[Runner]] = {
        ENGINE: EngineRunner,
        EAGER: TorchRunner,
        COMPILE: CompiledRunner,
        EXPORTER: TransformersExport,
        EXPORT: ExportedRunner,
        EXPORT_FUSED: ExportedRunner,
    }
    if kind not in kinds:
        raise ValueError(f"unknown contestant {kind!r}")
    if kind in (EXPORT, EXPORT_FUSED):
        values["folder"] = f"{values['folder']}/{FUSED if kind == EXPORT_FUSED else PLAIN}"
    return kinds[kind](**values)
