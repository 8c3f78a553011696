"""Checks of a Hugging Face model folder that need no torch: what is it, is it whole, is it supported at all.

Weights are read in the safetensors format only. Pickle files run code when loaded and are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from moe_export.digests import digest_file, recall, remember
from moe_export.errors import EnvironmentLacksError, SourceError, UnsupportedModelError
from moe_export.files import describe_path
from moe_export.importer.config_facts import experts_in_config
from moe_export.importer.finite import check_finite_tensors
from moe_export.importer.quantized import QuantizedTensor, quantized_tensors
from moe_export.importer.quantized_config import Quantization, read_quantization
from moe_export.importer.safetensors_header import HeaderEntry, read_header
from moe_export.progress import NullProgress, Progress

__all__ = [
    "CheckpointInfo",
    "TensorInfo",
    "check_finite",
    "experts_in_config",
    "file_digests",
    "hash_of_digests",
    "inspect_checkpoint",
    "source_hash",
]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_FINITE = "all weights are finite"
"""What is remembered of a weight file, as long as it is unchanged (:mod:`moe_export.digests`)."""
_HASHED_CONFIGS = (CONFIG_NAME, "generation_config.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FOREIGN = {
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "consolidated.safetensors": "Mistral's own",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint: dtype as safetensors names it, shape, the file it lies in and where there
    (bytes)."""

    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    nbytes: int


@dataclass(frozen=True)
class CheckpointInfo:
    """A model folder whose config and safetensors headers are sound.

    ``shards``: file names, sorted. ``total_bytes``: of all tensors. ``hash_cheap``: SHA-256 over the config
    and the headers and sizes of the weight files; it tells layouts apart, not weight values
    (:func:`source_hash` does). ``quantized``: float tensors that several of ``tensors`` stand for, by the
    name they have in a float checkpoint.
    """

    folder: Path
    config: dict[str, Any]
    model_type: str
    architectures: tuple[str, ...]
    shards: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    total_bytes: int
    hash_cheap: str
    quantization: Quantization | None = None
    quantized: Mapping[str, QuantizedTensor] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Mapping[str, TensorInfo | QuantizedTensor]:
        """The checkpoint as one of float tensors: those that it holds, and those that are dequantised."""
        parts = {part for tensor in self.quantized.values() for part in tensor.parts.values()}
        return {name: info for name, info in self.tensors.items() if name not in parts} | dict(self.quantized)


def inspect_checkpoint(folder: str | Path, *, trust_remote_code: bool = False) -> CheckpointInfo:
    """Read the config and every safetensors header of a model folder and check them. Loads no weight.

    Raises:
        SourceError: not a model folder, or damaged: names the file or tensor. UnsupportedModelError: the
        model is whole, and of an unknown type, needs its own code, or is quantised in a way that is not
        read.
    """
    folder = Path(folder)
    config = _read_config(folder)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SourceError(
            f"{folder / CONFIG_NAME} has no 'model_type', so it does not say what model this is; save the "
            "model with "
            "save_pretrained() of transformers"
        )
    quantization = read_quantization(folder / CONFIG_NAME, config)
    _check_known(folder, config, model_type, trust_remote_code)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise SourceError(f"{folder / CONFIG_NAME}: 'architectures' is not a list of names")
    shards, tensors = _read_weights(folder)
    quantized = quantized_tensors(folder, quantization, tensors)
    return CheckpointInfo(
        folder=folder,
        config=config,
        model_type=model_type,
        architectures=tuple(architectures),
        shards=shards,
        tensors=tensors,
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        hash_cheap=_hash_layout(config, folder, shards, tensors),
        quantization=quantization,
        quantized=quantized,
    )


def check_finite(folder: str | Path, progress: Progress | None = None) -> None:
    """Read every float tensor of a model folder once, in blocks of a few MiB.

    Raises:
        SourceError: a weight is NaN or infinite; names the tensor, the file, how many and the first
        coordinate.
    """
    folder = Path(folder)
    shards, tensors = _read_weights(folder)
    places = {
        name: (folder / tensor.shard, HeaderEntry(tensor.dtype, tensor.shape, tensor.begin, tensor.nbytes))
        for name, tensor in tensors.items()
    }
    before = {shard: (folder / shard).stat() for shard in shards}
    fresh = {shard for shard, info in before.items() if recall(info, _FINITE) is None}
    check_finite_tensors({n: p for n, p in places.items() if p[0].name in fresh}, progress or NullProgress())
    for shard in fresh:
        remember(before[shard], (folder / shard).stat(), _FINITE, "yes")


def remember_finite(shard: Path) -> None:
    """Keep that :func:`check_finite` found a weight file sound, after a second name changed its times."""
    info = shard.stat()
    remember(info, info, _FINITE, "yes")


def source_hash(folder: str | Path, progress: Progress | None = None) -> str:
    """SHA-256 over config.json, generation_config.json (if there) and the weight files: names, sizes and the
    SHA-256 of each."""
    return hash_of_digests(file_digests(folder, progress))


def file_digests(folder: str | Path, progress: Progress | None = None) -> dict[str, tuple[int, str]]:
    """Config and weight files of a model folder: name → size in bytes and SHA-256, of large files by blocks
    (:mod:`moe_export.digests`).

    Raises:
        SourceError: a file cannot be read.
    """
    folder = Path(folder)
    shards, _ = _read_weights(folder)
    configs = [name for name in _HASHED_CONFIGS if (folder / name).is_file()]
    names = [*configs, *shards]
    digests: dict[str, tuple[int, str]] = {}
    try:
        sizes = {name: (folder / name).stat().st_size for name in names}
        with (progress or NullProgress()).stage("hash source", sum(sizes.values())) as advance:
            for name in names:
                digests[name] = sizes[name], digest_file(folder / name, advance)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}") from error
    return digests


def hash_of_digests(digests: Mapping[str, tuple[int, str]]) -> str:
    """One hash of :func:`file_digests`' result."""
    text = "".join(f"{name}\0{size}\0{digest}\0" for name, (size, digest) in digests.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not os.path.isfile(path):
        _not_a_model(folder)
    return _read_json(path)


def _not_a_model(folder: Path) -> NoReturn:
    what = describe_path(folder)
    wanted = f"a model folder has {CONFIG_NAME} and safetensors files, as save_pretrained() writes them"
    if os.path.exists(folder):
        raise SourceError(f"{folder} {what}, not a Hugging Face model folder; {wanted}")
    hub = ""
    if len(folder.parts) == 2 and not folder.is_absolute():
        hub = f" (moe-export downloads nothing; fetch it first: `hf download {folder} --local-dir DIR`)"
    raise SourceError(f"{folder} {what}{hub}; {wanted}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _check_known(folder: Path, config: dict[str, Any], model_type: str, trust_remote_code: bool) -> None:
    """Refuse a model type that transformers does not know. The usual case does not import torch."""
    try:
        from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise EnvironmentLacksError(
            "reading Hugging Face models needs transformers: `pip install 'moe-export[hf]'`"
        ) from error
    if model_type in CONFIG_MAPPING_NAMES:
        return
    # Types that transformers adds by hand, or that the program registered: this module imports torch.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        return
    if config.get("auto_map"):
        if trust_remote_code:
            return
        raise UnsupportedModelError(
            f"{folder}: model_type {model_type!r} is not in the installed transformers, its code lies in the "
            "folder "
            "(auto_map); read that code, then allow it with --trust-remote-code"
        )
    names = [str(name) for name in CONFIG_MAPPING]
    raise UnsupportedModelError(
        f"{folder / CONFIG_NAME}: unknown model_type {model_type!r}; {_nearest(model_type, names)}upgrade "
        "transformers if "
        "the model is newer than it"
    )


def _nearest(name: str, names: list[str]) -> str:
    """Only the nearest names: transformers knows some 800."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}; " if near else ""


def _read_weights(folder: Path) -> tuple[tuple[str, ...], dict[str, TensorInfo]]:
    """File names and every tensor, from model.safetensors or else from the index, as transformers chooses."""
    listed: dict[str, str] = {}
    shards: tuple[str, ...] = (WEIGHTS_NAME,)
    if not (folder / WEIGHTS_NAME).is_file():
        if not (folder / INDEX_NAME).is_file():
            _no_weights(folder)
        listed = _read_index(folder)
        shards = tuple(sorted(set(listed.values())))
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, entry in read_header(folder / shard).items():
            if name in tensors:
                raise SourceError(f"{folder}: tensor {name!r} lies in both {tensors[name].shard} and {shard}")
            tensors[name] = TensorInfo(entry.dtype, entry.shape, shard, entry.begin, entry.nbytes)
    for name, shard in listed.items():
        if name not in tensors:
            raise SourceError(f"{folder / INDEX_NAME} says tensor {name!r} is in {shard}, which lacks it")
        if tensors[name].shard != shard:
            raise SourceError(
                f"{folder / INDEX_NAME} says tensor {name!r} is in {shard}, it is in {tensors[name].shard}"
            )
    if not tensors:
        raise SourceError(f"{folder / shards[0]} holds no tensor")
    return shards, tensors


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: 'weight_map' is missing or is not a table of tensor name to file")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not set(shard) & set("/\\\0")
        if not plain or not shard.endswith(".safetensors"):
            raise SourceError(
                f"{path}: tensor {name!r}: {shard!r} is not the name of a safetensors file beside it"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise SourceError(
            f"{folder}: {len(missing)} of the {len(shards)} weight files that {INDEX_NAME} lists are "
            "missing: "
            f"{', '.join(missing[:3])}{more}; download or copy them again"
        )
    return weight_map


def _no_weights(folder: Path) -> NoReturn:
    wanted = f"{WEIGHTS_NAME} or {INDEX_NAME}"
    for name in (WEIGHTS_NAME, INDEX_NAME):
        if (folder / name).is_symlink():
            raise SourceError(f"{folder / name} is a link to a missing file; download the model again")
        if (folder / name).exists():
            raise SourceError(f"{folder / name} is not a file")
    for name in _PICKLES:
        if (folder / name).exists():
            raise SourceError(
                f"{folder} has its weights only as {name}, a pickle, which can run code when it is loaded "
                "and is "
                "refused; if you trust it, convert it once: AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR, safe_serialization=True)"
            )
    for name, whose in _FOREIGN.items():
        if (folder / name).exists():
            raise SourceError(f"{folder} has its weights only in {whose} format ({name}), not as {wanted}")
    if (folder / "adapter_config.json").exists():
        raise SourceError(
            f"{folder} is a PEFT adapter; merge it into its base model with merge_and_unload() first"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise SourceError(f"{folder} has {', '.join(others[:3])} but no {wanted}; the index is missing")
    raise SourceError(f"{folder} has a config and no weights (no {wanted}); was the download complete?")


def _hash_layout(
    config: dict[str, Any], folder: Path, shards: tuple[str, ...], tensors: Mapping[str, TensorInfo]
) -> str:
    sizes = {shard: (folder / shard).stat().st_size for shard in shards}
    layout = [[name, t.dtype, t.shape, t.shard, t.begin, t.nbytes] for name, t in sorted(tensors.items())]
    text = json.dumps([config, sizes, layout], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
