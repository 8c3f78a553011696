"""The first layers of a model, for a quick trial: the same model cut short, and proof that it is only that.

The configuration is cut (the number of layers and lists with an entry for each), and a model is made of it on
the meta device beside one of the whole configuration. Every module that is left must be what it was: same
class, same attributes, same shapes of weights. So a family whose layers look at the number of layers, at the
last one or at anything else that was cut is refused, and not built differently.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import SourceError, UnsupportedModelError, UsageError
from ..files import update_hash
from ..progress import NullProgress, Progress

if TYPE_CHECKING:
    from torch import nn

    from .checkpoint import CheckpointInfo
    from .weight_sources import StoredWeights

_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Where configurations have the number of layers of a stack."""
_NOT_OF_LAYERS = ("eos_token_id", "architectures", "time_step_limit", "rope_parameters", "rope_scaling")
"""Lists that have no entry for each layer, whatever their length."""
_OWN_NUMBER = ("layer_idx", "layer_id", "layer_index", "layer_number")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FirstLayers:
    """``config``: of the model that has the first ``count`` of ``depth`` layers, of each of its stacks.

    ``count`` None: it has no more than that, and ``config`` is the whole one.
    """

    config: Any
    count: int | None
    depth: int


def first_layers(cls: Any, config: Any, count: int, options: Mapping[str, Any] | None = None) -> FirstLayers:
    """The configuration of the first ``count`` layers of a model of class ``cls``, proven to be that.

    Raises:
        UsageError: the model has fewer layers, or its first ones have no experts.
        UnsupportedModelError: they are not what they are in the whole model.
    """
    short = copy.deepcopy(config)
    depths = [_cut(part, count) for part in _text_configs(short)]
    depth = max((d for d in depths if d is not None), default=0)
    name = getattr(config, "model_type", cls.__name__)
    if not depth:
        raise UnsupportedModelError(
            f"layers: the configuration of {name} has no number of layers ({', '.join(_COUNTS)}), so nothing "
            "can be cut; "
            "leave layers out"
        )
    if count > depth:
        raise UsageError(f"layers: {count} asked for, and the model has {depth}; leave layers out")
    if count == depth:
        return FirstLayers(config, None, depth)
    whole = _meta_model(cls, config, options, "")
    cut = _meta_model(cls, short, options, name)
    _check_same(whole, cut, count, name)
    _check_experts(whole, cut, count)
    return FirstLayers(short, count, depth)


def first_layers_of(model: Any, count: int) -> tuple[Any, FirstLayers]:
    """A copy of a live transformers ``model`` that has its first ``count`` layers only.

    Raises:
        UsageError, UnsupportedModelError: as :func:`first_layers`.
    """
    import torch

    found = first_layers(type(model), model.config, count)
    if found.count is None:
        return model, found
    state = model.state_dict()
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    made = type(model)._from_config(found.config, dtype=dtype)
    wanted = made.state_dict()
    made.load_state_dict({name: state[name] for name in wanted})
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training), found


def read_needed(
    cls: Any,
    found: FirstLayers,
    checkpoint: CheckpointInfo,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> str:
    """Read the weights of the first layers, and no others: SHA-256 over them and the configuration.

    Raises:
        SourceError: a weight is missing, NaN or infinite, or cannot be read.
    """
    from .finite import check_finite_tensors
    from .safetensors_header import HeaderEntry
    from .weight_sources import stored_weights

    progress = progress or NullProgress()
    stored = stored_weights(_meta_model(cls, found.config, options, ""), checkpoint)
    needed = sorted(needed_tensors(stored))
    tensors = checkpoint.tensors
    digest = hashlib.sha256(f"first {found.count} of {found.depth} layers\0".encode())
    try:
        for name in ("config.json", "generation_config.json"):
            path = checkpoint.folder / name
            digest.update(path.read_bytes() if path.is_file() else b"")
        with progress.stage("hash source", sum(tensors[n].nbytes for n in needed)) as advance:
            for name in needed:
                info = tensors[name]
                digest.update(f"\0{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
                with (checkpoint.folder / info.shard).open("rb") as stream:
                    stream.seek(info.begin)
                    update_hash(digest, _Part(stream, info.nbytes), advance)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}") from error
    check_finite_tensors(
        {
            n: (
                checkpoint.folder / tensors[n].shard,
                HeaderEntry(tensors[n].dtype, tensors[n].shape, tensors[n].begin, tensors[n].nbytes),
            )
            for n in needed
        },
        progress,
    )
    return digest.hexdigest()


def needed_tensors(stored: StoredWeights) -> set[str]:
    """Names of the checkpoint's tensors that the model's weights come from."""
    quantized = stored.checkpoint.quantized
    names = _needed_weights(stored)
    parts = [quantized[name].parts.values() if name in quantized else (name,) for name in names]
    return {part for group in parts for part in group}


def only_needed(stored: StoredWeights) -> CheckpointInfo:
    """The checkpoint, with those of its quantised weights only that the model's come from."""
    needed = _needed_weights(stored)
    quantized = {name: held for name, held in stored.checkpoint.quantized.items() if name in needed}
    return dataclasses.replace(stored.checkpoint, quantized=quantized)


def _needed_weights(stored: StoredWeights) -> set[str]:
    """By the names they have in a float checkpoint."""
    from .weight_sources import AsStored

    names: set[str] = set()
    for source in stored.sources.values():
        names.update((source.tensor,) if isinstance(source, AsStored) else source.tensors)
    return names


class _Part:
    """The next ``left`` bytes of a stream, as a stream."""

    def __init__(self, stream: Any, left: int) -> None:
        self._stream, self._left = stream, left

    def readinto(self, buffer: memoryview) -> int:
        """Fill ``buffer`` as far as there is something."""
        count: int = self._stream.readinto(buffer[: min(len(buffer), self._left)])
        if not count and self._left:
            raise OSError(5, "it became shorter while it was read", self._stream.name)
        self._left -= count
        return count


def _text_configs(config: Any) -> list[Any]:
    """Parts of ``config`` that count the layers that text passes: of an encoder and a decoder both."""
    if not getattr(config, "is_encoder_decoder", False):
        return [config.get_text_config(decoder=True)]
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return [part for part in parts if any(type(vars(part).get(key)) is int for key in _COUNTS)]


def _cut(config: Any, count: int) -> int | None:
    """Cut ``config`` to ``count`` layers; returns how many there were, None where it says nothing of it."""
    values = vars(config)
    main = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    depths = {key: values[key] for key in {main, *_COUNTS} if type(values.get(key)) is int}
    if main in depths and not getattr(config, "is_encoder_decoder", False):
        depths = {main: depths[main]}
    known = set(depths.values())
    if not known and type(counted := getattr(config, "num_hidden_layers", None)) is int:
        known = {counted}  # a property: the length of a list
    lists = 0
    for key, value in list(values.items()):
        if key in depths:
            values[key] = min(count, depths[key])
        elif _of_layers(key, value) and len(value) in known:
            values[key] = value[:count]
            lists += 1
    return max(known) if depths or lists else None


def _of_layers(key: str, value: Any) -> bool:
    """Whether an entry of a configuration may have something for each layer."""
    if isinstance(value, str):
        return key.endswith("pattern")
    return isinstance(value, (list, tuple)) and key not in _NOT_OF_LAYERS


def _meta_model(cls: Any, config: Any, options: Mapping[str, Any] | None, cut: str) -> Any:
    """A model without memory. ``cut``: the family whose configuration was cut; it may not take that."""
    import torch

    try:
        with torch.device("meta"):
            return cls._from_config(copy.deepcopy(config), dtype=torch.float32, **(options or {})).eval()
    except Exception as error:  # each model class raises its own
        if not cut:
            raise SourceError(
                f"transformers cannot make a {cls.__name__} of its configuration: {error}"
            ) from error
        raise UnsupportedModelError(
            f"layers: {cut} cannot be cut short: transformers makes no {cls.__name__} of the shortened "
            f"configuration ({type(error).__name__}: {str(error).splitlines()[0][:200]}); leave layers out"
        ) from error


def _check_same(whole: Any, cut: Any, count: int, family: str) -> None:
    """Every module of ``cut`` is the one of ``whole``, and what ``cut`` lacks are layers behind the first
    ``count`` of lists of layers.

    Raises:
        UnsupportedModelError: names the first difference.
    """
    fault = _Comparison(whole, cut, count).first_fault()
    if fault:
        raise UnsupportedModelError(
            f"layers: the first {count} layers of {family} cannot be taken by themselves: {fault}; leave "
            "layers out"
        )


class _Comparison:
    """A model on the meta device, and the same cut to ``count`` layers."""

    def __init__(self, whole: Any, cut: Any, count: int) -> None:
        from torch import nn

        self._count = count
        self._before: dict[str, nn.Module] = dict(whole.named_modules())
        self._after: dict[str, nn.Module] = dict(cut.named_modules())
        lists = {name: m for name, m in self._after.items() if isinstance(m, nn.ModuleList)}
        self._shortened: dict[str, tuple[int, int]] = {}
        for name, module in lists.items():
            other = self._before.get(name)
            if isinstance(other, nn.ModuleList) and len(other) != len(module):
                self._shortened[name] = len(other), len(module)
        self._gone = _layer_types(whole.config) - _layer_types(cut.config)

    def first_fault(self) -> str:
        """The first difference in words; empty: none."""
        if not self._shortened:
            return "no list of layers became shorter"
        for name, (depth, left) in self._shortened.items():
            if left != min(self._count, depth):
                return f"{name} keeps {left} of {depth}"
        for name in self._before:
            if name not in self._after and not self._behind(name):
                return f"{name} is missing"
        for name, module in self._after.items():
            if name not in self._before:
                return f"{name} is new"
            difference = self._difference(name, self._before[name], module)
            if difference:
                return f"{name or type(module).__name__} would have another {difference}"
        return ""

    def _behind(self, name: str) -> bool:
        """Whether ``name`` lies in a layer behind those that are left."""
        for path, (_, left) in self._shortened.items():
            match = re.match(rf"{re.escape(path)}\.(\d+)(?:\.|$)", name)
            if match is not None and int(match[1]) >= left:
                return True
        return False

    def _difference(self, name: str, before: nn.Module, after: nn.Module) -> str:
        """What of two modules differs beside their children; empty: nothing."""
        if type(before) is not type(after):
            return "class"
        inside = any(name.startswith(f"{path}.") for path in self._shortened)
        old, new = _plain(before), _plain(after)
        for key in sorted({*old, *new}):
            pair = old.get(key), new.get(key)
            if pair[0] != pair[1] and (inside or not self._follows(key, *pair)):
                return key
        tensors, others = _tensors(before), _tensors(after)
        for key in sorted({*tensors, *others}):
            if tensors.get(key) != others.get(key) and (inside or key in others or not self._names_gone(key)):
                return f"weight or buffer {key}"
        return ""

    def _follows(self, key: str, old: Any, new: Any) -> bool:
        """Whether an attribute around the layers may differ: it is their number, or is about a type of layer
        of which none is left."""
        if (old, new) in self._shortened.values() or self._names_gone(key):
            return True
        return isinstance(old, (list, tuple, set)) and set(old) - set(new or ()) <= self._gone

    def _names_gone(self, key: str) -> bool:
        return any(kind in key or kind.partition("_")[0] in key.split("_") for kind in self._gone)


def _layer_types(config: Any) -> set[str]:
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    return {kind for kind in kinds if isinstance(kind, str)}


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are numbers, texts, and collections of them."""
    kinds = (bool, int, float, str, tuple, list, set)
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, kinds) and key not in _OWN_NUMBER and key[:1] != "_"
    }


def _tensors(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Shape and dtype of the module's own parameters and buffers."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own}


def _check_experts(whole: nn.Module, cut: nn.Module, count: int) -> None:
    """Raises:
    UsageError: the first layers have no experts, though the model has.
    """
    from .export import moe_layer_names

    every = moe_layer_names(whole)
    if not every or moe_layer_names(cut):
        return
    numbers = [int(found[1]) for name in every if (found := re.search(r"\.(\d+)(?:\.|$)", name))]
    first = min(numbers, default=count) + 1
    raise UsageError(
        f"layers: the first {count} of the layers have no experts; the first that has is layer {first}, so "
        f"ask for {first} "
        "or more"
    )
