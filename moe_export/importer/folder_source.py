"""A Hugging Face folder as a source: its checkpoint read and checked, its model made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError, UnsupportedModelError
from ..process_memory import give_back_memory
from ..progress import Progress
from .quantized import QuantizedWeights
from .sources import LoadedSource, library_source, require_installed

if TYPE_CHECKING:
    from .checkpoint import CheckpointInfo
    from .first_layers import FirstLayers


@dataclass(frozen=True)
class Taken:
    """What of a model folder is taken, and how; see :func:`~moe_export.importer.sources.load_source`."""

    hollow: bool = False
    streamed: bool = False
    layers: int | None = None


def folder_source(
    folder: Path, task: str | None, trust_remote_code: bool, taken: Taken, progress: Progress
) -> LoadedSource:
    """A model folder, loaded; see :func:`~moe_export.importer.sources.load_source`."""
    from .checkpoint import hash_of_digests, inspect_checkpoint
    from .read_through import read_through

    checkpoint = inspect_checkpoint(folder, trust_remote_code=trust_remote_code)
    digests = {} if taken.layers is not None else read_through(folder, progress)
    require_installed("transformers", "transformers")
    config, loader, options = _read_config(folder, trust_remote_code)
    if checkpoint.quantization is not None:
        if options:
            raise UnsupportedModelError(
                f"{folder}: its weights are quantised ({checkpoint.quantization.method}), which is read "
                "for classes of transformers, and its class is code in the folder; take the float "
                "checkpoint"
            )
        _forget_quantization(config)
    cut = None
    if taken.layers is not None:
        cut, digests, digest = _first_layers(folder, checkpoint, (config, loader, options), taken, progress)
        config = cut.config
    else:
        digest = hash_of_digests(digests)
    with progress.stage("load the source model"), _no_library_bars():
        if taken.hollow or checkpoint.quantization is not None or (cut is not None and cut.count):
            from .first_layers import only_needed
            from .hollow import hollow_model

            model, stored = hollow_model(loader, config, checkpoint, options, whole=not taken.hollow)
            _read_generation_config(model, folder)
            stored = dataclasses.replace(stored, digests=digests, streamed=taken.streamed)
            source = library_source(model, str(folder), task, digest, cut)
            quantized = QuantizedWeights.of(only_needed(stored))
            return dataclasses.replace(source, stored=stored if taken.hollow else None, quantized=quantized)
        model = _load_whole(folder, loader, options)
    return library_source(model.eval(), str(folder), task, digest)


def _load_whole(folder: Path, loader: Any, options: dict[str, Any]) -> Any:
    import torch

    try:
        model, loading = loader.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # safetensors, huggingface_hub and each model class raise their own
        raise SourceError(f"{folder}: transformers cannot load it: {_told(error)}") from error
    _refuse_incomplete(folder, loading)
    give_back_memory()
    return model


def _read_config(folder: Path, trust_remote_code: bool) -> tuple[Any, Any, dict[str, Any]]:
    """The configuration, the class that loads the model, and options for it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # each configuration class raises its own
        raise SourceError(f"{folder}/config.json: transformers cannot read it: {_told(error)}") from error
    return (config, *_loader(folder, config, trust_remote_code))


def _first_layers(
    folder: Path,
    checkpoint: CheckpointInfo,
    model: tuple[Any, Any, dict[str, Any]],
    taken: Taken,
    progress: Progress,
) -> tuple[FirstLayers, dict[str, tuple[int, str]], str]:
    """What the first layers are, digests of the checkpoint's files where all are read, and the hash of what
    is read."""
    from .checkpoint import hash_of_digests
    from .first_layers import first_layers, read_needed
    from .read_through import read_through

    assert taken.layers is not None  # the caller looked
    config, loader, options = model
    if options:
        raise UnsupportedModelError(
            f"layers: the class of {folder} is code in the folder, and only classes of transformers are cut; "
            "leave "
            "layers out"
        )
    cut = first_layers(loader, config, taken.layers)
    if cut.count is None:
        digests = read_through(folder, progress)
        return cut, digests, hash_of_digests(digests)
    return cut, {}, read_needed(loader, cut, checkpoint, progress=progress)


def _forget_quantization(config: Any) -> None:
    """The weights that the model is given are floats."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _read_generation_config(model: Any, folder: Path) -> None:
    """What ends a text, and which token starts one, as ``from_pretrained`` reads it."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file() or not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its class checks itself with whatever exceptions it likes
        raise SourceError(
            f"{folder}/generation_config.json: transformers cannot read it: {_told(error)}"
        ) from error


def _loader(folder: Path, config: Any, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The class that loads the model, and options for it."""
    import transformers

    name = (config.architectures or [None])[0]
    cls = getattr(transformers, name, None) if name else None
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls, {}
    if trust_remote_code:
        return transformers.AutoModelForCausalLM, {"trust_remote_code": True}
    what = "names no class" if name is None else f"names {name!r}, no model class of"
    raise SourceError(
        f"{folder}/config.json: architectures {what} the installed transformers {transformers.__version__}; "
        "code in "
        "the folder runs only with --trust-remote-code"
    )


def _refuse_incomplete(folder: Path, loading: dict[str, Any]) -> None:
    """transformers fills in random values for what a checkpoint lacks, and only warns."""
    for kind, text in (("missing_keys", "lack"), ("mismatched_keys", "have another shape of")):
        names = sorted(str(k[0] if isinstance(k, tuple) else k) for k in loading.get(kind) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SourceError(
                f"{folder}: the weight files {text} {', '.join(names[:3])}{more}; the model would run with "
                "random "
                "values there. Copy the checkpoint again, or correct config.json"
            )


def _told(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


@contextmanager
def _no_library_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; ours is the one the user sees."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
