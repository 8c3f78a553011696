"""What a build proves about its engine: parity, speed, use of the experts, and the reports of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import BuildConfig
from .progress import Progress
from .schema import Manifest
from .sms import GPU_TARGETS

if TYPE_CHECKING:
    from .bundle.writer import BundleWriter
    from .importer.sources import LoadedSource
    from .verify.result import ParityReport


def gather_evidence(
    loaded: LoadedSource,
    config: BuildConfig,
    writer: BundleWriter,
    manifest: Manifest,
    output: Path,
    progress: Progress,
) -> Manifest:
    """Verify and measure the engine where it lies, before it gets its name ``output``; write reports beside
    it."""
    gpu = config.target in GPU_TARGETS
    if gpu:
        from .verify.gpu_targets import not_done

        manifest = dataclasses.replace(manifest, notes=(*manifest.notes, *not_done(config)))
    if config.ep > 1 and not gpu:
        manifest = dataclasses.replace(manifest, notes=(*manifest.notes, *_left_to_ranks(config)))
    if not (config.verify or config.bench):
        return manifest
    from .report.html import write_report

    staged = writer.stage(manifest)
    evidence = writer.path / "evidence"
    evidence.mkdir(exist_ok=True)
    summaries: dict[str, Any] = {}
    parity = bench = usage = None
    if config.verify:
        from .verify import verify_bundle
        from .verify.write import write_reports

        report = _verify(verify_bundle, loaded, config, writer.path, progress)
        report = dataclasses.replace(report, bundle=str(output))
        write_reports(report, evidence)
        parity = report.to_dict()
        summaries["parity"] = report.summary()
        usage = None if gpu or config.ep > 1 else _usage(writer.path, config, progress)
        if usage is not None:
            (evidence / "usage.json").write_text(json.dumps(usage, indent=2) + "\n", encoding="utf-8")
    if config.bench and not gpu and config.ep == 1:
        from .bench import bench_bundle

        chosen: dict[str, Any] = {
            "batch": config.bench_batches,
            "sequence": config.bench_sequences,
            "rounds": config.bench_rounds,
            "baselines": config.bench_baselines,
        }
        measured = bench_bundle(
            writer.path,
            source=loaded.module if loaded.path is None else str(loaded.path),
            threads=config.threads,
            seed=config.seed,
            trust=True,
            progress=progress,
            **{k: v for k, v in chosen.items() if v is not None},
        )
        bench = measured.to_dict()
        summaries["bench"] = measured.summary()
        (evidence / "bench.json").write_text(json.dumps(bench, indent=2) + "\n", encoding="utf-8")
    manifest = dataclasses.replace(manifest, evidence={**manifest.evidence, **summaries})
    staged = writer.stage(manifest)
    write_report(staged, parity=parity, bench=bench, usage=usage)
    return manifest


def _left_to_ranks(config: BuildConfig) -> tuple[str, ...]:
    """What the evidence of a build on one process does not show of several ranks, a line each."""
    start = f"mpiexec -n {config.ep} moe-export"
    parity = f"not verified; `{start} verify BUNDLE` does it"
    if config.verify:
        parity = f"checked with all ranks' graphs as one; `{start} verify BUNDLE` has them exchange over MPI"
    return (parity, f"not measured: `{start} bench BUNDLE` measures the ranks")


def _verify(
    verify_bundle: Any, loaded: LoadedSource, config: BuildConfig, folder: Path, progress: Progress
) -> ParityReport:
    from .models.reference import ReferenceModel

    report: ParityReport = verify_bundle(
        folder,
        against=ReferenceModel(loaded),
        trust=True,
        tolerances=config.tolerances or None,
        seed=config.seed,
        threads=config.threads,
        progress=progress,
        simulate=config.target in GPU_TARGETS or config.ep > 1,
    )
    return report


def _usage(folder: Path, config: BuildConfig, progress: Progress) -> dict[str, Any] | None:
    """How often each expert is chosen on the verification text; None without experts or tokenizer."""
    from .bundle.reader import open_bundle
    from .inspect.tracing import trace_path
    from .verify.texts import CODE, PROSE

    manifest = open_bundle(folder, trust=True).manifest
    if not manifest.moe_layers or manifest.text is None or manifest.text.tokenizer is None:
        return None
    return trace_path(folder, PROSE + CODE, threads=config.threads, trust=True).to_dict()
