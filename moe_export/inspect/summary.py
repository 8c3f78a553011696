"""What a source model or a bundle is: parameters, MoE layers, routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.errors import SourceError, UnsupportedModelError, choices_text
from moe_export.inspect.layers import ExpertBlock, find_expert_blocks
from moe_export.inspect.parameters import ParameterCount, count_parameters

if TYPE_CHECKING:
    import torch

    from moe_export.schema import MoELayer


@dataclass(frozen=True)
class LayerSummary:
    """One MoE layer. Sizes are None where the model does not tell them."""

    index: int
    name: str
    num_experts: int
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    shared_experts: int | None = None
    routing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSummary:
    """A source model or a bundle. ``parameters``: ``total``, ``active``, ``active_without_embeddings``."""

    kind: str
    """``huggingface``, ``module`` or ``bundle``."""
    path: str | None
    model_type: str
    class_name: str
    dtype: str | None
    parameters: dict[str, int | None]
    moe_layers: tuple[LayerSummary, ...]
    routing: str = ""
    """How tokens choose experts, in words, where the family is registered."""
    details: dict[str, Any] = field(default_factory=dict)
    """Of a bundle: target, task, opset, limits, evidence, decisions."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect_path(path: str | Path, *, trust_remote_code: bool = False) -> ModelSummary:
    """Summary of a bundle, of a Hugging Face folder (its config is enough) or of ``file.py:function``.

    Raises:
        SourceError: nothing there that could be a model; the message says what was looked for.
    """
    text = str(path)
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        return inspect_bundle(folder)
    if ".py:" in text:
        return _inspect_function(text)
    if not folder.is_dir():
        raise SourceError(
            f"{text}: no such folder; expected a bundle, a Hugging Face folder, or path/file.py:function"
        )
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{text}: neither a bundle (no manifest.json) nor a Hugging Face model (no config.json)"
        )
    return _inspect_huggingface(folder, trust_remote_code)


def inspect_model(
    model: torch.nn.Module, *, kind: str = "module", path: str | None = None, config: Any = None
) -> ModelSummary:
    """Summary of a module; its parameters may be on the meta device."""
    config = config if config is not None else getattr(model, "config", None)
    blocks = find_expert_blocks(model, config)
    count = count_parameters(model, config, blocks)
    dtype = getattr(config, "dtype", None) or next((p.dtype for p in model.parameters()), None)
    model_type = str(getattr(config, "model_type", "") or type(model).__name__)
    return ModelSummary(
        kind=kind,
        path=path,
        model_type=model_type,
        class_name=type(model).__name__,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        parameters=_public(count),
        moe_layers=tuple(_layer(i, block) for i, block in enumerate(blocks)),
        routing=_family_routing(type(model).__name__, blocks),
        notes=_notes(count, blocks),
    )


def _public(count: ParameterCount) -> dict[str, int | None]:
    return {
        "total": count.total,
        "active": count.active,
        "active_without_embeddings": count.active_without_embeddings,
        "routed_experts": count.routed_experts,
        "embeddings": count.embeddings,
    }


def _notes(count: ParameterCount, blocks: tuple[ExpertBlock, ...]) -> tuple[str, ...]:
    notes = []
    if not blocks:
        notes.append("no mixture-of-experts layer found: every parameter is active")
    if count.note:
        notes.append(f"{count.note}: active parameters cannot be counted")
    if count.tied_embeddings:
        notes.append("the output head shares the input embeddings: counted once, left out together")
    return tuple(notes)


def _layer(index: int, block: ExpertBlock) -> LayerSummary:
    return LayerSummary(
        index=index,
        name=block.name,
        num_experts=block.num_experts,
        top_k=block.top_k,
        hidden_size=block.hidden_size,
        intermediate_size=block.intermediate_size,
        shared_experts=block.shared_experts,
        routing=block.routing,
    )


def _family_routing(class_name: str, layers: Sequence[ExpertBlock | MoELayer]) -> str:
    """The family's routing in words, with this model's numbers where its layers agree on them."""
    import re

    from moe_export.models.families import FAMILIES

    text = next((f.routing for f in FAMILIES.values() if class_name in f.classes), "")
    numbers = {(layer.top_k, layer.num_experts) for layer in layers}
    top_k, experts = numbers.pop() if len(numbers) == 1 else (None, None)
    return re.sub(r"top-\d+ of \d+", f"top-{top_k or 'K'} of {experts or 'E'}", text)


def _inspect_huggingface(folder: Path, trust_remote_code: bool) -> ModelSummary:
    config = read_config(folder, trust_remote_code)
    return inspect_model(
        meta_model(config, trust_remote_code), kind="huggingface", path=str(folder), config=config
    )


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration in ``folder``.

    Raises:
        SourceError: ``config.json`` is damaged.
        UnsupportedModelError: transformers does not know its model type.
    """
    import json

    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise SourceError(f"{path}: expected an object with the text field 'model_type'")
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in values):
        own = "; its own code runs with --trust-remote-code only" if "auto_map" in values else ""
        near = choices_text(model_type, CONFIG_MAPPING).partition("choices:")[0].rstrip("; ")
        raise UnsupportedModelError(
            f"{path}: transformers has no model type {model_type!r}{own}{'; ' + near if near else ''}"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # a configuration class checks itself with whatever exceptions it likes
        raise SourceError(f"{path}: {error}") from error


def meta_model(config: Any, trust_remote_code: bool = False) -> torch.nn.Module:
    """The model that ``config`` describes, with every parameter on the meta device (no memory).

    Raises:
        UnsupportedModelError: no class of transformers fits ``config``.
        SourceError: its class refuses ``config``.
    """
    import torch
    import transformers

    names = getattr(config, "architectures", None) or []
    cls = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)
    if cls is None and not (trust_remote_code and getattr(config, "auto_map", None)):
        cls = next((a._model_mapping[type(config)] for a in autos if type(config) in a._model_mapping), None)
        if cls is None:
            raise UnsupportedModelError(f"no model class of transformers for {type(config).__name__}")
    try:
        with torch.device("meta"):
            if cls is None:
                return autos[0].from_config(config, trust_remote_code=trust_remote_code)
            return cls(config)
    except Exception as error:  # a model class stumbles over odd values with whatever comes
        raise SourceError(f"{getattr(cls, '__name__', 'the model')} refuses config.json: {error}") from error


def _inspect_function(source: str) -> ModelSummary:
    from moe_export.importer.sources import load_source

    return inspect_model(load_source(source).module, kind="module", path=source)


def inspect_bundle(path: str | Path) -> ModelSummary:
    """Summary of a bundle from its manifest alone (file hashes are not checked).

    Raises:
        BundleError: the manifest is damaged or of a newer schema.
    """
    from moe_export.bundle.manifest import read_manifest
    from moe_export.schema import to_json

    manifest = read_manifest(Path(path))
    layers = tuple(
        LayerSummary(
            index=layer.index,
            name=layer.name,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size,
            routing={"router": layer.router, "note": layer.router_note},
        )
        for layer in manifest.moe_layers
    )
    known = ("total", "active", "active_without_embeddings")
    return ModelSummary(
        kind="bundle",
        path=str(path),
        model_type=manifest.source.model_type,
        class_name=manifest.source.class_name,
        dtype=manifest.dtype,
        parameters={name: manifest.parameters.get(name) for name in known},
        moe_layers=layers,
        routing=_family_routing(manifest.source.class_name, manifest.moe_layers),
        details={
            "target": manifest.target,
            "task": manifest.task,
            "opset": manifest.opset,
            "limits": to_json(manifest.limits),
            "size_bytes": sum(f.size for f in manifest.files),
            "decisions": to_json(manifest.decisions),
            "evidence": to_json(manifest.evidence),
            "created": manifest.created,
        },
        notes=manifest.notes,
    )
