"""The library's entry points: :func:`export` and :func:`build`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import BuildConfig
from .errors import CheckFailed, UsageError, choices_text
from .progress import NullProgress, Progress
from .schema import Limits, Manifest, TextInfo
from .sms import GPU_TARGETS

if TYPE_CHECKING:
    from .bundle.reader import Bundle
    from .bundle.writer import BundleWriter
    from .importer.sources import LoadedSource
    from .importer.weight_sources import StoredWeights


def export(
    source: Any,
    output: str | Path,
    *,
    task: str | None = None,
    dtype: str = "float32",
    opset: int = 20,
    weights: str = "auto",
    layers: int | None = None,
    inputs: dict[str, Any] | None = None,
    dynamic: dict[str, dict[int, str]] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export ``source`` to portable ONNX in the folder ``output``: no lowering, no checks of parity or speed.

    Args:
        source: model folder, ``file.py:function``, ``transformers`` model, or ``nn.Module`` with ``inputs``.
        output: folder to make; holds ``model.onnx``, its weights, and ``manifest.json``.
        weights: of a model folder. ``reference``: they stay in the checkpoint's files, which ``output`` then
            shares by hard links, and none is held in memory; ``stream``: read one by one and written anew;
            ``load``: all read first, and written anew; ``auto``: referenced where that is possible and the
            weights take 2 GiB or more, else loaded.
        layers: of a transformers model: its first so many layers only, for a trial.
        resume: as for :func:`build`.
        inputs, dynamic: of an own module; see :func:`moe_export.importer.sources.load_source`.

    Returns: the folder.

    Raises:
        UsageError, SourceError, ExportError, EnvironmentLacksError: see the message.
    """
    config = BuildConfig(
        target="portable",
        task=task,
        dtype=dtype,
        opset=opset,
        weights=weights,
        layers=layers,
        verify=False,
        bench=False,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    made = build(
        source, output, config, inputs=inputs, dynamic=dynamic, resume=resume, progress=progress
    )
    return made.path


def build(
    source: Any,
    output: str | Path,
    config: BuildConfig | None = None,
    *,
    inputs: dict[str, Any] | None = None,
    dynamic: dict[str, dict[int, str]] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Export, lower, write, verify and measure ``source``: one bundle with its evidence in ``output``.

    Args:
        source, inputs, dynamic: as for :func:`export`.
        config: every choice; ``options`` are fields of :class:`BuildConfig` and win.
        resume: go on with what an interrupted build of the same source, choices and tools wrote of this
            output, and keep what is written when this one is interrupted.

    Returns: the bundle. An unchanged build that is there already is returned as it is, and noted.

    Raises:
        CheckFailed: parity is outside its tolerances; the bundle is written and holds the report.
        UsageError, SourceError, ExportError, EnvironmentLacksError: see the message; nothing is written.
    """
    known = [field.name for field in dataclasses.fields(BuildConfig)]
    for name in options:
        if name not in known:
            raise UsageError(f"unknown build option {name!r}; {choices_text(name, known)}")
    config = dataclasses.replace(config or BuildConfig(), **options)
    with _mode_kept(source):
        return _build(source, Path(output), config, inputs, dynamic, resume, progress or NullProgress())


@contextmanager
def _mode_kept(source: Any) -> Iterator[None]:
    """A live model is put into eval mode for a build; afterwards it is in the mode it was in."""
    modules = list(source.modules()) if hasattr(source, "modules") else []
    before = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _build(
    source: Any,
    output: Path,
    config: BuildConfig,
    inputs: dict[str, Any] | None,
    dynamic: dict[str, dict[int, str]] | None,
    resume: bool,
    progress: Progress,
) -> Bundle:
    from .backends import get_backend
    from .backends.data_file import kept_files
    from .bundle.cache import cache_key, find_unchanged
    from .bundle.reader import open_bundle
    from .bundle.writer import BundleWriter
    from .evidence import gather_evidence
    from .importer.sources import load_source

    if not (output / "manifest.json").is_file():
        BundleWriter(output, overwrite=config.overwrite).check()
    environment = get_backend(config.target).environment(dataclasses.asdict(config))
    weights = _where_weights_lie(source, config, progress)
    loaded = load_source(
        source,
        task=config.task,
        inputs=inputs,
        dynamic=dynamic,
        trust_remote_code=config.trust_remote_code,
        hollow=weights != "load",
        streamed=weights == "stream",
        layers=config.layers,
        progress=progress,
    )
    if loaded.info.trial:
        progress.note(loaded.info.trial)
    _limits(loaded, config)
    key = cache_key(loaded.info.hash, {**config.key_fields(), **environment})
    unchanged = find_unchanged(output, key, progress=progress) if output.exists() else None
    if unchanged is not None:
        progress.note(f"{output} is unchanged: same source, options and tools; nothing to build")
        _raise_if_failed(unchanged)
        return unchanged
    referenced = loaded.stored is not None and not loaded.stored.streamed
    each = 0 if referenced else 4 if config.dtype == "float32" else 2
    weight_bytes = sum(p.numel() for p in loaded.module.parameters()) * each
    if referenced and loaded.stored is not None and loaded.quantized is not None:
        from .importer.kept import written_bytes

        weight_bytes += written_bytes(loaded.quantized, loaded.stored, config.dtype, config.opset)
    with BundleWriter(
        output,
        overwrite=config.overwrite,
        required_bytes=int(weight_bytes * (1 + len(environment.get("sm", ()))) * 1.1) + (1 << 20),
        key=key,
        resume=resume,
        kept=kept_files,
        progress=progress,
    ) as writer:
        manifest = _write_engine(loaded, config, environment, writer, progress)
        manifest = dataclasses.replace(manifest, evidence={**manifest.evidence, "cache_key": key})
        manifest = gather_evidence(loaded, config, writer, manifest, output, progress)
        writer.commit(manifest)
    bundle = open_bundle(output, trust=True)
    _raise_if_failed(bundle)
    return bundle


REFERENCE_FROM = 2 << 30
"""Bytes of weights from which ``weights = "auto"`` does not load them. Smaller models are loaded: then the
traced program is run beside the model, and onnx's own tools take the export's files."""


def _where_weights_lie(source: Any, config: BuildConfig, progress: Progress) -> str:
    """``load``, ``reference`` or ``stream``. A note says why large weights are loaded.

    Raises:
        UsageError: one was asked for, and cannot be.
    """
    how = config.weights
    if how == "auto":
        how = "reference" if config.target == "portable" else "stream"
    problem = config.weights_problem(how)
    if how == "load" or (problem and (config.verify or config.target in GPU_TARGETS)):
        return "load"
    folder = isinstance(source, (str, Path)) and (Path(source) / "config.json").is_file()
    if not folder:
        name = source if isinstance(source, (str, Path)) else type(source).__name__
        problem = f"is for a model folder, and {name} is none"
    elif config.trust_remote_code:
        problem = "is for models whose class is one of transformers' own, so not with trust_remote_code"
    if config.weights == how and problem:
        raise UsageError(f"weights: {how} {problem}")
    if not folder or (config.weights == "auto" and _weight_bytes(Path(source)) < REFERENCE_FROM):
        return "load"
    if problem:
        progress.note(f"the weights are loaded: {how} {problem}")
    return "load" if problem else how


def _weight_bytes(folder: Path) -> int:
    """Of the weight files; of quantised ones, what their weights take as 16-bit floats."""
    from .importer.quantized_config import expansion

    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) * expansion(folder)


def _raise_if_failed(bundle: Bundle) -> None:
    parity = bundle.manifest.evidence.get("parity")
    if isinstance(parity, dict) and parity.get("passed") is False:
        raise CheckFailed(
            f"{bundle.path}: parity with the source failed; the bundle is written for you to look at, see "
            f"{bundle.path / 'evidence' / 'report.html'} or run: moe-export verify {bundle.path}"
        )


def _write_engine(
    loaded: LoadedSource,
    config: BuildConfig,
    environment: dict[str, Any],
    writer: BundleWriter,
    progress: Progress,
) -> Manifest:
    from .backends import get_backend
    from .expert_parallel import check_ranks, divide
    from .importer.export import export_model
    from .inspect import count_parameters, find_expert_blocks
    from .verify.gpu_targets import require_covered_inputs

    limits = _limits(loaded, config)
    backend = get_backend(config.target)
    blocks = find_expert_blocks(loaded.module, getattr(loaded.module, "config", None))
    check_ranks(config, blocks)
    backend.check_layers(blocks, dataclasses.asdict(config))
    exported = export_model(loaded, dtype=config.dtype, opset=config.opset, progress=progress)
    if config.target in GPU_TARGETS and config.verify:
        require_covered_inputs(exported, config, limits)
    divided, placing = divide(config, loaded.task, exported.io, exported.moe_layers)
    known = limits.max_batch is not None and limits.max_sequence is not None
    max_tokens = (limits.max_batch or 0) * (limits.max_sequence or 0) if known else None
    with progress.stage(f"lower for {config.target}"):
        lowered = backend.build(
            exported,
            writer.path,
            {
                "expert_lowering": config.expert_lowering,
                "native_lowering": config.native_lowering,
                "expert_weights": config.expert_weights,
                "quantize": config.quantize,
                "quantized_lowering": config.quantized_lowering,
                "threads": config.threads,
                "max_batch": limits.max_batch,
                "max_sequence": limits.max_sequence,
                "max_tokens": max_tokens,
                "expert_parallel": divided,
                **environment,
            },
        )
    if loaded.stored is not None:
        _take_over_hashes(loaded.stored, writer)
    count = count_parameters(loaded.module, getattr(loaded.module, "config", None))
    parameters = {
        "total": count.total,
        "active": count.active,
        "active_without_embeddings": count.active_without_embeddings,
    }
    text = _copy_tokenizer(loaded, writer.path)
    return Manifest(
        source=loaded.info,
        task=loaded.task,
        target=config.target,
        dtype=config.dtype,
        opset=config.opset,
        io=lowered.io,
        limits=limits,
        moe_layers=lowered.moe_layers,
        decisions=(*placing, *lowered.decisions),
        notes=(*filter(None, [loaded.info.trial]), *lowered.notes, *_streamed_note(loaded)),
        cache=lowered.cache,
        rows_apart=lowered.rows_apart,
        state=lowered.plans.state,
        sm=lowered.plans.sm,
        engines=lowered.plans.engines,
        model_file="model.onnx" if divided is None else f"{divided.folder(0)}/model.onnx",
        expert_parallel=divided,
        quantization=config.quantize if lowered.quantized_layers else None,
        text=text,
        parameters={k: int(v) for k, v in parameters.items() if v is not None},
    )


def _limits(loaded: LoadedSource, config: BuildConfig) -> Limits:
    """What an engine accepts. Plans have an end to their shapes, so GPU targets have limits where none were
    asked."""
    limits = Limits(config.max_batch, _max_sequence(loaded, config))
    if config.target not in GPU_TARGETS:
        return limits
    from .backends.trt.profiles import engine_limits

    return engine_limits(limits, asked=config.max_sequence is not None)


def _max_sequence(loaded: LoadedSource, config: BuildConfig) -> int | None:
    """What was asked for, but never more than the positions the model was made for."""
    model_config = getattr(loaded.module, "config", None)
    if model_config is None or loaded.kind != "huggingface":
        return config.max_sequence
    limit = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return config.max_sequence
    if config.max_sequence is not None and config.max_sequence > limit:
        raise UsageError(
            f"max_sequence: {config.max_sequence} is beyond the {limit} positions the model was made for"
        )
    return config.max_sequence or limit


def _streamed_note(loaded: LoadedSource) -> tuple[str, ...]:
    if loaded.stored is None or not loaded.stored.streamed:
        return ()
    return ("weights: read from the checkpoint one by one and written anew",)


def _take_over_hashes(stored: StoredWeights, writer: BundleWriter) -> None:
    """What was hashed as the source need not be hashed again as a part of the bundle."""
    from .backends.weight_files import CHECKPOINT_FOLDER
    from .importer.checkpoint import remember_finite

    for name, (size, digest) in stored.digests.items():
        if (writer.path / CHECKPOINT_FOLDER / name).is_file():
            writer.know(f"{CHECKPOINT_FOLDER}/{name}", size, digest)
            remember_finite(writer.path / CHECKPOINT_FOLDER / name)


def _copy_tokenizer(loaded: LoadedSource, folder: Path) -> TextInfo | None:
    if loaded.text is None:
        return None
    if loaded.text.tokenizer is not None:
        target = folder / loaded.text.tokenizer
        target.mkdir()
        for file in loaded.tokenizer_files:
            shutil.copyfile(file, target / file.name)
    return loaded.text
