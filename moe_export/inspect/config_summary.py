"""Summaries of presets and of configs whose family has a reader: arithmetic only, no model is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_export.costs import weight_format
from moe_export.errors import SourceError, UnsupportedModelError, UsageError
from moe_export.importer.quantized_config import quantizations, read_quantization
from moe_export.inspect.architecture import Architecture
from moe_export.inspect.config_fields import MissingFieldError
from moe_export.inspect.config_readers import has_reader, read_architecture
from moe_export.inspect.needs import DEFAULT_CONTEXT, Workload, context_note, needs
from moe_export.inspect.presets import RULES, Preset, find_preset
from moe_export.inspect.summary import COUNTING_RULE, LayerSummary, ModelSummary, family_routing

_QUANTISED = {"fp8": "float8", "mxfp4": "mxfp4", "gptq": "int4", "awq": "int4"}


@dataclass(frozen=True)
class Described:
    """An architecture and where it is from. ``weights``: the format that its checkpoint has."""

    name: str
    architecture: Architecture
    weights: str
    preset: Preset | None = None
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def config_path(path: str | Path) -> Path | None:
    """The ``config.json`` that ``path`` is or holds; None if there is none."""
    here = Path(path)
    if here.is_file() and here.suffix == ".json":
        return here
    return here / "config.json" if (here / "config.json").is_file() else None


def read_values(path: Path) -> dict[str, Any]:
    """The fields of a config file.

    Raises:
        SourceError: not JSON, or without ``model_type``.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise SourceError(f"{path}: expected an object with the text field 'model_type'")
    return values


def describe(path_or_preset: str | Path) -> Described:
    """What a config file, a folder with one, or a preset's name describes. A path that exists wins.

    Raises:
        SourceError: neither; or the config is damaged. UnsupportedModelError: no reader for its family.
    """
    text = str(path_or_preset)
    path = config_path(text)
    if path is not None:
        return describe_config(read_values(path), path)
    preset = find_preset(text)
    if preset is not None:
        return Described(preset.name, preset.architecture, preset.weights, preset, preset.notes)
    if Path(text).exists():
        raise SourceError(
            f"{text}: no config.json there; expected a config, a model folder, or a preset's name"
        )
    from moe_export.inspect.presets import get_preset

    try:
        get_preset(text)
    except SourceError as error:
        raise SourceError(f"{text}: no such file or folder, and {error}") from error
    raise AssertionError("find_preset and get_preset disagree")


def describe_config(values: Mapping[str, Any], path: Path) -> Described:
    """The same for the fields of one config; a field left out is asked of transformers' own class."""
    name = path.parent.name if path.name == "config.json" else path.stem
    try:
        architecture = read_architecture(values, str(path))
    except MissingFieldError:
        architecture = read_architecture(_completed(values, path), str(path))
    except UsageError as error:
        if str(path) in str(error):
            raise
        raise SourceError(f"{path}: {error}") from error
    details, notes = stored_quantization(values, path)
    stored = stored_format(values, architecture)
    return Described(name or str(path), architecture, stored, notes=notes, details=details)


def stored_format(values: Mapping[str, Any], architecture: Architecture) -> str:
    """The format of a checkpoint's weights: what its quantisation says, else its dtype."""
    quantised = next(iter(quantizations(values)), None)
    fields = quantised if isinstance(quantised, Mapping) else {}
    method = str(fields.get("quant_method"))
    if method in _QUANTISED:
        return "int8" if method == "gptq" and fields.get("bits") == 8 else _QUANTISED[method]
    return architecture.dtype if architecture.dtype in ("float32", "float16", "bfloat16") else "bfloat16"


def stored_quantization(values: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How a checkpoint's weights are quantised, as a detail of the summary, and notes about it."""
    try:
        found = read_quantization(path, values)
    except UnsupportedModelError as error:
        note = "sizes are those of float weights where moe-export does not read the quantisation: "
        return {"quantization": "in a way that is not read"}, (note + str(error),)
    return ({"quantization": found.text()} if found else {}), ()


def _completed(values: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """``values`` with the defaults of transformers' configuration class, where it has that model type."""
    from transformers import CONFIG_MAPPING

    model_type = str(values["model_type"])
    if model_type not in CONFIG_MAPPING:
        return values
    try:
        config = CONFIG_MAPPING[model_type](**values)
    except Exception as error:  # a configuration class checks itself with whatever exceptions it likes
        raise SourceError(f"{path}: {error}") from error
    names = {name: getattr(config, name, None) for name in config.attribute_map}
    return names | config.to_dict() | {"model_type": model_type}


def checkpoint_files(path: str | None) -> dict[str, Any]:
    """Number and size of the weight files beside a config; nothing is read of them."""
    folder = Path(path or "")
    files = [f for ending in ("*.safetensors", "pytorch_model*.bin") for f in folder.glob(ending)]
    return {"weight_files": len(files), "weight_bytes": sum(f.stat().st_size for f in files)} if files else {}


def can_describe(values: Mapping[str, Any]) -> bool:
    """Whether a config's family has a reader."""
    return has_reader(values.get("model_type"))


def summary_of(
    described: Described, path: str | None, context: int | None, batch: int, weights: str | None, cache: str
) -> ModelSummary:
    """The summary, and the needs of ``batch`` sequences of ``context`` tokens (see ``inspect_path``)."""
    arch = described.architecture
    total, active = arch.parameters(), arch.active_parameters()
    tokens = min(DEFAULT_CONTEXT, arch.max_positions or DEFAULT_CONTEXT) if context is None else context
    load = Workload(weight_format(weights or described.weights), cache, tokens, batch)
    notes = [*described.notes]
    if not arch.moe_layers:
        notes.append("no mixture-of-experts layer: every parameter is active")
    if arch.tied:
        notes.append("the output head shares the input embeddings: counted once, left out together")
    if arch.vision:
        notes.append("active are the parameters that a text token uses: the image encoder's are not")
    if (warning := context_note(arch, tokens)) is not None:
        notes.append(warning)
    layers = tuple(
        LayerSummary(i, moe.name, moe.experts, moe.top_k, arch.hidden, moe.intermediate,
                     moe.shared_experts, dict(moe.routing))
        for i, moe in enumerate(arch.moe_layers)
    )  # fmt: skip
    preset = described.preset
    return ModelSummary(
        kind="preset" if path is None else "huggingface",
        path=path,
        model_type=arch.model_type,
        class_name=arch.class_name,
        dtype=arch.dtype,
        parameters={
            "total": sum(total.values()),
            "active": sum(active.values()),
            "active_without_embeddings": sum(active.values()) - total["embeddings"],
            "routed_experts": total["routed_experts"],
            "embeddings": total["embeddings"],
        },
        moe_layers=layers,
        routing=family_routing(arch.class_name, layers),
        details=checkpoint_files(path) | dict(described.details)
        if preset is None
        else {"preset": preset.name, "title": preset.title, "source": preset.source},
        notes=tuple(notes),
        counting_rule=COUNTING_RULE,
        components={
            name: {"total": count, "active": active[name]} for name, count in total.items() if count
        },
        needs=needs(arch, load),
        published=() if preset is None else tuple(
            {**asdict(figure), "rule_text": RULES[figure.rule], "ours_billions": figure.ours(arch),
             "agrees": figure.agrees(arch)}
            for figure in preset.published
        ),
    )  # fmt: skip
