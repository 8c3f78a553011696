"""What a user hands in as a model: a Hugging Face folder, a live model, or a function that makes one."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import EnvironmentLacksError, SourceError, UnsupportedModelError, UsageError, choices_text
from ..progress import NullProgress, Progress
from ..schema import TASKS, SourceInfo, Task, TextInfo
from .identity import library_model_hash
from .quantized import QuantizedWeights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .checkpoint import CheckpointInfo
    from .first_layers import FirstLayers
    from .weight_sources import StoredWeights


@dataclass(frozen=True)
class LoadedSource:
    """A model ready to export: ``module`` is in eval mode and float32."""

    module: nn.Module
    kind: Literal["huggingface", "module"]
    task: Task
    info: SourceInfo
    path: Path | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    text: TextInfo | None = None
    tokenizer_files: tuple[Path, ...] = ()
    stored: StoredWeights | None = None
    """Where the weights lie, of a source whose ``module`` is hollow (:mod:`moe_export.importer.hollow`)."""
    quantized: QuantizedWeights | None = None
    """Of a folder whose weights are quantised; ``module`` has them dequantised."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model takes ``decoder_input_ids``."""
        return bool(getattr(getattr(self.module, "config", None), "is_encoder_decoder", False)) and (
            self.task == "text-generation"
        )


def load_source(
    source: Any,
    *,
    task: str | None = None,
    inputs: dict[str, torch.Tensor] | None = None,
    dynamic: dict[str, dict[int, str]] | None = None,
    trust_remote_code: bool = False,
    hollow: bool = False,
    streamed: bool = False,
    layers: int | None = None,
    progress: Progress | None = None,
) -> LoadedSource:
    """Load ``source`` in float32 and eval mode.

    Args:
        source: folder with ``config.json`` and safetensors; ``file.py:function`` where the function returns
            ``(module, inputs, dynamic)``; a ``transformers`` model; or any ``nn.Module`` (then ``inputs`` is
            needed).
        task: one of :data:`moe_export.schema.TASKS`; None = chosen from the model.
        inputs: sample inputs of an own module by name.
        dynamic: input name → {axis: symbolic dimension}; every other axis is fixed.
        hollow: leave the large weights of a model folder where they lie; the model can be traced, not run.
        streamed: of a hollow model: the graph's weights are read when they are written, not referred to.
        layers: take a transformers model's first so many layers only; of a folder, no other is read.

    Raises:
        SourceError: the source is missing, damaged or of an unknown or refused family.
        UsageError: arguments that do not fit the source.
        EnvironmentLacksError: torch or transformers is not installed.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"unknown task {task!r}; {choices_text(task, TASKS)}")
    _require("torch", "torch")
    from torch import nn

    from .own_module import call_factory, module_source

    if isinstance(source, nn.Module):
        if _is_library_model(source):
            return _live_source(source, None, task, layers)
        _refuse_layers(layers)
        return module_source(source, None, inputs, dynamic, task)
    if not isinstance(source, (str, Path)):
        raise UsageError(
            f"source: expected a folder, file.py:function or an nn.Module, got {type(source).__name__}"
        )
    text = str(source)
    file, colon, function = text.rpartition(":")
    if colon and file.endswith(".py"):
        module, found_inputs, found_dynamic = call_factory(Path(file), function)
        if _is_library_model(module):
            return _live_source(module, text, task, layers)
        _refuse_layers(layers)
        return module_source(module, text, inputs or found_inputs, dynamic or found_dynamic, task)
    if text.endswith(".py"):
        raise SourceError(f"{text}: name the function that makes the model: {text}:build")
    taken = _Taken(hollow, streamed, layers)
    return _folder_source(Path(text), task, trust_remote_code, taken, progress or NullProgress())


@dataclass(frozen=True)
class _Taken:
    """What of a model folder is taken, and how; see :func:`load_source`."""

    hollow: bool = False
    streamed: bool = False
    layers: int | None = None


def _live_source(model: Any, path: str | None, task: str | None, layers: int | None) -> LoadedSource:
    """A transformers model that is there already, or its first layers."""
    if layers is None:
        return _library_source(model, path, task, "")
    from .first_layers import first_layers_of

    short, cut = first_layers_of(model, layers)
    return _library_source(short, path, task, "", cut)


def _refuse_layers(layers: int | None) -> None:
    if layers is not None:
        raise UsageError(
            "layers: only models of transformers are cut; let your own function make a module with fewer "
            "layers"
        )


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise EnvironmentLacksError(
            f"{package} is not installed; install it with: pip install 'moe-export[hf]'"
        )


def _is_library_model(module: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def as_float32(module: nn.Module) -> nn.Module:
    """``module`` in eval mode, and a float32 copy of it where it is of another float type."""
    import copy

    import torch

    other = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        module = copy.deepcopy(module).float()
    return module.eval()


def check_finite_state(module: nn.Module) -> None:
    """Refuse weights that are no numbers. Infinite buffers are masks; a NaN is wrong anywhere.

    Raises:
        SourceError: names the tensor, how many values and the first.
    """
    import torch

    tensors = [(name, "weight", t, torch.isfinite(t)) for name, t in module.named_parameters()]
    tensors += [(name, "buffer", t, ~torch.isnan(t)) for name, t in module.named_buffers()]
    for name, kind, tensor, good in tensors:
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(good.all()):
            bad = torch.nonzero(~good)
            raise SourceError(
                f"{kind} {name!r} holds {len(bad)} values that are NaN or infinite, the first at "
                f"{tuple(int(i) for i in bad[0])}; the model would compute nonsense"
            )


def _folder_source(
    folder: Path, task: str | None, trust_remote_code: bool, taken: _Taken, progress: Progress
) -> LoadedSource:
    from .checkpoint import hash_of_digests, inspect_checkpoint
    from .read_through import read_through

    checkpoint = inspect_checkpoint(folder, trust_remote_code=trust_remote_code)
    digests = {} if taken.layers is not None else read_through(folder, progress)
    _require("transformers", "transformers")
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
            source = _library_source(model, str(folder), task, digest, cut)
            quantized = QuantizedWeights.of(only_needed(stored))
            return dataclasses.replace(source, stored=stored if taken.hollow else None, quantized=quantized)
        model = _load_whole(folder, loader, options)
    return _library_source(model.eval(), str(folder), task, digest)


def _load_whole(folder: Path, loader: Any, options: dict[str, Any]) -> Any:
    import torch

    try:
        model, loading = loader.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # safetensors, huggingface_hub and each model class raise their own
        raise SourceError(f"{folder}: transformers cannot load it: {_told(error)}") from error
    _refuse_incomplete(folder, loading)
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
    taken: _Taken,
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


def _library_source(
    model: nn.Module, path: str | None, task: str | None, digest: str, cut: FirstLayers | None = None
) -> LoadedSource:
    from ..models.families import FAMILIES
    from ..models.families import family as find_family

    model = as_float32(model)
    config = cast(Any, model).config
    model_type = family_name(model)
    if model_type in FAMILIES and find_family(model_type).status == "refused":
        raise UnsupportedModelError(f"family {model_type}: {find_family(model_type).reason}")
    if not digest:
        check_finite_state(model)
        digest = library_model_hash(model)
    if task == "module":
        raise UsageError(
            "task 'module' is for an own nn.Module; a transformers model is text-generation or "
            "feature-extraction"
        )
    head = model.get_output_embeddings() is not None
    chosen = task or ("text-generation" if head else "feature-extraction")
    if chosen == "text-generation" and not head:
        raise UsageError(f"{type(model).__name__} has no language-model head; use --task feature-extraction")
    info = SourceInfo("huggingface", path, model_type, type(model).__name__, digest)
    if cut is not None and cut.count is not None:
        info = dataclasses.replace(info, layers=cut.count, all_layers=cut.depth)
    if chosen == "feature-extraction" and head:
        model = _without_head(model)
    files = tuple(Path(path) / n for n in TOKENIZER_FILES if (Path(path) / n).is_file()) if path else ()
    return LoadedSource(
        model,
        "huggingface",
        cast(Task, chosen),
        info,
        Path(path) if path else None,
        text=_text_info(model, config, files),
        tokenizer_files=files,
    )


def _without_head(model: Any) -> Any:
    """What gives the hidden states of a model with a language-model head: its base, or its encoder."""
    inner = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    if inner is model or inner.get_input_embeddings() is None:
        raise UsageError(f"{type(model).__name__} has no part of its own that gives hidden states")
    return inner


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def family_name(model: nn.Module) -> str:
    """The transformers folder that the model's class comes from (``mixtral``)."""
    parts = type(model).__module__.split(".")
    if len(parts) > 2 and parts[:2] == ["transformers", "models"]:
        return parts[2]
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _text_info(model: Any, config: Any, tokenizer_files: tuple[Path, ...]) -> TextInfo:
    generation = getattr(model, "generation_config", None)
    text_config = config.get_text_config(decoder=True)

    def token(name: str) -> Any:
        for holder in (generation, text_config, config):
            value = getattr(holder, name, None)
            if value is not None:
                return value
        return None

    eos = token("eos_token_id")
    eos_ids = tuple(
        int(i) for i in (eos if isinstance(eos, (list, tuple)) else [eos] if eos is not None else [])
    )
    start = token("decoder_start_token_id")
    return TextInfo(
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        eos_token_ids=eos_ids,
        bos_token_id=_first(token("bos_token_id")),
        pad_token_id=_first(token("pad_token_id")),
        decoder_start_token_id=_first(start),
        tokenizer="tokenizer" if any(f.name == "tokenizer.json" for f in tokenizer_files) else None,
    )


def _first(value: Any) -> int | None:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return None if value is None else int(value)
