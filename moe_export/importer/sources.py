"""What a user hands in as a model: a Hugging Face folder, a live model, or a function that makes one."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
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
    require_installed("torch", "torch")
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
    from .folder_source import Taken, folder_source

    taken = Taken(hollow, streamed, layers)
    return folder_source(Path(text), task, trust_remote_code, taken, progress or NullProgress())


def _live_source(model: Any, path: str | None, task: str | None, layers: int | None) -> LoadedSource:
    """A transformers model that is there already, or its first layers."""
    if layers is None:
        return library_source(model, path, task, "")
    from .first_layers import first_layers_of

    short, cut = first_layers_of(model, layers)
    return library_source(short, path, task, "", cut)


def _refuse_layers(layers: int | None) -> None:
    if layers is not None:
        raise UsageError(
            "layers: only models of transformers are cut; let your own function make a module with fewer "
            "layers"
        )


def require_installed(module: str, package: str) -> None:
    """Raises:
    EnvironmentLacksError: ``module`` of ``package`` is not installed.
    """
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


def library_source(
    model: nn.Module, path: str | None, task: str | None, digest: str, cut: FirstLayers | None = None
) -> LoadedSource:
    """What is known of a transformers model. ``digest``: its hash; empty: hash and check the live weights.
    ``cut``: ``model`` is the first layers of another.

    Raises:
        UnsupportedModelError: the family is refused. SourceError: a live weight is NaN or infinite.
        UsageError: the model is not for ``task``.
    """
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
