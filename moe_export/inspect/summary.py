"""What a source model or a bundle is: parameters, MoE layers, routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.errors import SourceError, UnsupportedModelError, choices_text
from moe_export.inspect.layers import ExpertBlock, find_expert_blocks
from moe_export.inspect.parameters import ParameterCount, count_parameters

if TYPE_CHECKING:
    import torch

    from moe_export.schema import MoELayer

COUNTING_RULE = (
    "total: every parameter once, shared matrices once, no buffers; active: all but the routed experts and "
    "an image encoder, plus the K of E routed experts of every layer; without embeddings: without the input "
    "embedding matrix"
)


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
    """``huggingface``, ``module``, ``bundle`` or ``preset``."""
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
    counting_rule: str = ""
    components: dict[str, dict[str, int]] = field(default_factory=dict)
    """``total`` and ``active`` parameters of each part of the model, where its family has a reader."""
    needs: dict[str, Any] = field(default_factory=dict)
    """Memory, cache, work per token, GPUs (see :func:`moe_export.inspect.needs.needs`)."""
    published: tuple[dict[str, Any], ...] = ()
    """Of a preset: its publisher's figures, by which rule, and the same figure counted here."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect_path(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    context: int | None = None,
    batch: int = 1,
    weights: str | None = None,
    cache: str = "",
) -> ModelSummary:
    """Summary of a bundle, a config (file or Hugging Face folder), ``file.py:function`` or a preset's name.

    A path that exists wins over a preset. The needs are those of ``batch`` sequences of ``context`` tokens
    (default: 4096, or the model's maximum if that is less) with the weights in the format ``weights``
    (default: as published) and the cache in ``cache`` (default: as wide as activations).

    Raises:
        SourceError: nothing there that could be a model; the message says what was looked for.
    """
    from moe_export.inspect.config_summary import (
        can_describe,
        config_path,
        describe,
        describe_config,
        read_values,
        summary_of,
    )
    from moe_export.inspect.presets import find_preset

    text = str(path)
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        return inspect_bundle(folder)
    if ".py:" in text:
        return _inspect_function(text)
    config = config_path(folder)
    if config is not None:
        values = read_values(config)
        if can_describe(values):
            described = describe_config(values, config)
            # A class with another head, as for classification, has other parameters: it is built instead.
            if described.architecture.class_name in (
                values.get("architectures") or [described.architecture.class_name]
            ):
                return summary_of(described, text, context, batch, weights, cache)
        return _inspect_huggingface(config, trust_remote_code)
    if not folder.exists():
        if find_preset(text) is None:
            from moe_export.inspect.presets import presets

            raise SourceError(
                f"{text}: no such folder; expected a bundle, a Hugging Face folder, a config.json, "
                f"path/file.py:function or a preset; {choices_text(text.lower(), presets())}"
            )
        return summary_of(describe(text), None, context, batch, weights, cache)
    raise SourceError(
        f"{text}: neither a bundle (no manifest.json) nor a Hugging Face model (no config.json)"
    )


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
        routing=family_routing(type(model).__name__, blocks),
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


def family_routing(class_name: str, layers: Sequence[ExpertBlock | MoELayer | LayerSummary]) -> str:
    """The family's routing in words, with this model's numbers where its layers agree on them."""
    import re

    from moe_export.models.families import FAMILIES

    text = next((f.routing for f in FAMILIES.values() if class_name in f.classes), "")
    numbers = {(layer.top_k, layer.num_experts) for layer in layers}
    top_k, experts = numbers.pop() if len(numbers) == 1 else (None, None)
    return re.sub(r"top-\d+ of \d+", f"top-{top_k or 'K'} of {experts or 'E'}", text)


def _inspect_huggingface(path: Path, trust_remote_code: bool) -> ModelSummary:
    """Summary of a config whose family has no reader: its transformers class is built without memory."""
    from moe_export.inspect.config_summary import checkpoint_files, read_values, stored_quantization
    from moe_export.inspect.needs import weights_only

    config = read_config(path, trust_remote_code)
    details, notes = stored_quantization(read_values(path), path)
    where = path.parent if path.name == "config.json" else path
    summary = inspect_model(
        meta_model(config, trust_remote_code), kind="huggingface", path=str(where), config=config
    )
    note = (
        f"cache, work per token and GPUs are not derived for the model type {summary.model_type!r}: how its "
        "layers attend is not described in moe_export/inspect/config_readers.py"
    )
    total = summary.parameters["total"] or 0
    return replace(
        summary,
        needs=weights_only(total),
        counting_rule=COUNTING_RULE,
        details=checkpoint_files(str(where)) | details,
        notes=(*summary.notes, note, *notes),
    )


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration in a folder, or in a config file.

    Raises:
        SourceError: ``config.json`` is damaged.
        UnsupportedModelError: transformers does not know its model type.
    """
    from moe_export.inspect.config_summary import read_values

    source = path
    path = path / "config.json" if path.is_dir() else path
    values = read_values(path)
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in values):
        own = "; its own code runs with --trust-remote-code only" if "auto_map" in values else ""
        near = choices_text(model_type, CONFIG_MAPPING).partition("choices:")[0].rstrip("; ")
        raise UnsupportedModelError(
            f"{path}: transformers has no model type {model_type!r}{own}{'; ' + near if near else ''}"
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, local_files_only=True)
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
        routing=family_routing(manifest.source.class_name, manifest.moe_layers),
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
