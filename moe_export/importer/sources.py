"""What a user hands in as a model: a Hugging Face folder, a live model, or a function that makes one."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import EnvironmentLacksError, SourceError, UsageError, choices_text
from ..progress import NullProgress, Progress
from ..schema import TASKS, SourceInfo, Task, TextInfo

if TYPE_CHECKING:
    import torch
    from torch import nn


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

    Raises:
        SourceError: the source is missing, damaged or of an unknown or refused family.
        UsageError: arguments that do not fit the source.
        EnvironmentLacksError: torch or transformers is not installed.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"unknown task {task!r}; {choices_text(task, TASKS)}")
    _require("torch", "torch")
    from torch import nn

    if isinstance(source, nn.Module):
        if _is_library_model(source):
            return _library_source(source, None, task, "")
        return _module_source(source, None, inputs, dynamic, task)
    if not isinstance(source, (str, Path)):
        raise UsageError(
            f"source: expected a folder, file.py:function or an nn.Module, got {type(source).__name__}"
        )
    text = str(source)
    file, colon, function = text.rpartition(":")
    if colon and file.endswith(".py"):
        module, found_inputs, found_dynamic = _call_factory(Path(file), function)
        if _is_library_model(module):
            return _library_source(module, text, task, "")
        return _module_source(module, text, inputs or found_inputs, dynamic or found_dynamic, task)
    if text.endswith(".py"):
        raise SourceError(f"{text}: name the function that makes the model: {text}:build")
    return _folder_source(Path(text), task, trust_remote_code, progress or NullProgress())


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


def _call_factory(file: Path, function: str) -> tuple[nn.Module, dict[str, Any], dict[str, dict[int, str]]]:
    from torch import nn

    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    name = f"_moe_export_source_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise SourceError(f"{file}: cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)
    factory = getattr(module, function, None)
    if not callable(factory):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise SourceError(f"{file}: no function {function!r}; {choices_text(function, known)}")
    made = factory()
    if isinstance(made, nn.Module) and _is_library_model(made):
        return made, {}, {}
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
        raise SourceError(
            f"{file}:{function}: expected (module, inputs, dynamic), got {type(made).__name__}; inputs maps "
            "input names to sample tensors, dynamic maps input names to {axis: dimension name}"
        )
    return made


def _module_source(
    module: nn.Module,
    path: str | None,
    inputs: dict[str, torch.Tensor] | None,
    dynamic: dict[str, dict[int, str]] | None,
    task: str | None,
) -> LoadedSource:
    import torch

    if task not in (None, "module"):
        raise UsageError(f"task {task!r} needs a transformers model; an own nn.Module is task 'module'")
    if not inputs:
        raise UsageError("an own nn.Module needs sample inputs: inputs={name: tensor}")
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"inputs[{name!r}]: expected a tensor, got {type(tensor).__name__}")
        for axis in (dynamic or {}).get(name, {}):
            if not 0 <= axis < tensor.dim():
                raise UsageError(f"dynamic[{name!r}]: axis {axis} of a tensor with {tensor.dim()} axes")
    for name in dynamic or {}:
        if name not in inputs:
            raise UsageError(f"dynamic: {name!r} is not an input; {choices_text(name, inputs)}")
    module = _as_float32(module)
    cls = type(module).__name__
    info = SourceInfo("module", path, cls, cls, state_hash(module))
    _check_finite_state(module)
    return LoadedSource(module, "module", "module", info, None, dict(inputs), dict(dynamic or {}))


def _as_float32(module: nn.Module) -> nn.Module:
    import copy

    import torch

    other = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        module = copy.deepcopy(module).float()
    return module.eval()


def _check_finite_state(module: nn.Module) -> None:
    import torch

    for name, tensor in module.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = torch.nonzero(~torch.isfinite(tensor))
            raise SourceError(
                f"weight {name!r} holds {len(bad)} values that are NaN or infinite, the first at "
                f"{tuple(int(i) for i in bad[0])}; the model would compute nonsense"
            )


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _folder_source(
    folder: Path, task: str | None, trust_remote_code: bool, progress: Progress
) -> LoadedSource:
    from .checkpoint import check_finite, inspect_checkpoint, source_hash

    inspect_checkpoint(folder, trust_remote_code=trust_remote_code)
    check_finite(folder, progress)
    digest = source_hash(folder, progress)
    _require("transformers", "transformers")
    import torch
    import transformers

    with progress.stage("load the source model"), _no_library_bars():
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        name = (config.architectures or [None])[0]
        cls = getattr(transformers, name, None) if name else None
        if cls is None and not trust_remote_code:
            raise SourceError(
                f"{folder}/config.json: architectures names {name!r}, which the installed transformers "
                f"{transformers.__version__} does not have; code in the folder runs only with "
                "--trust-remote-code"
            )
        loader = cls if cls is not None else transformers.AutoModelForCausalLM
        options: dict[str, Any] = {} if cls is not None else {"trust_remote_code": True}
        try:
            model = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise SourceError(
                f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}"
            ) from error
    source = _library_source(model.eval(), str(folder), task, digest)
    return source


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


def _library_source(model: nn.Module, path: str | None, task: str | None, digest: str) -> LoadedSource:
    from ..models.families import FAMILIES
    from ..models.families import family as find_family

    model = _as_float32(model)
    config = cast(Any, model).config
    model_type = family_name(model)
    if model_type in FAMILIES and find_family(model_type).status == "refused":
        from ..errors import UnsupportedModelError

        raise UnsupportedModelError(f"family {model_type}: {find_family(model_type).reason}")
    if not digest:
        digest = state_hash(model)
        _check_finite_state(model)
    if task == "module":
        raise UsageError(
            "task 'module' is for an own nn.Module; a transformers model is text-generation or "
            "feature-extraction"
        )
    head = model.get_output_embeddings() is not None  # type: ignore[operator]
    chosen = task or ("text-generation" if head else "feature-extraction")
    if chosen == "text-generation" and not head:
        raise UsageError(f"{type(model).__name__} has no language-model head; use --task feature-extraction")
    info = SourceInfo("huggingface", path, model_type, type(model).__name__, digest)
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
