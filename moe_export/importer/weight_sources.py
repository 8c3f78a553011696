"""Where in a checkpoint each parameter of a model comes from, without reading a weight.

A checkpoint often holds other tensors than the model: one matrix per expert where the model has a stack of
them, gate and up apart where the model has both in one. transformers converts while it loads; here its own
table of conversions is read, so that what needs no change can be used where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from .checkpoint import CheckpointInfo, TensorInfo

if TYPE_CHECKING:
    import torch

    from .quantized import QuantizedTensor


@dataclass(frozen=True)
class AsStored:
    """The parameter is one tensor of the checkpoint, shape and all."""

    tensor: str


@dataclass(frozen=True)
class PerExpert:
    """The parameter is a stack [E, ·, ·] of matrices that lie apart.

    ``parts``: for gate and up, or for one projection alone, the E tensors in the order of the experts. Expert
    e's matrix is the rows of ``parts[0][e]``, then those of ``parts[1][e]``.
    """

    parts: tuple[tuple[str, ...], ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """All of them, in the order in which they lie in the stack."""
        return tuple(name for expert in zip(*self.parts, strict=True) for name in expert)


@dataclass(frozen=True)
class Converted:
    """The parameter is computed from tensors by transformers' own conversion.

    ``convert``: called with the tensors by name, gives the parameter.
    """

    tensors: tuple[str, ...]
    convert: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


WeightSource = AsStored | PerExpert | Converted


@dataclass(frozen=True)
class StoredWeights:
    """A checkpoint, and where in it each weight of the model is, by the model's own name."""

    checkpoint: CheckpointInfo
    sources: Mapping[str, WeightSource]
    digests: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Size and SHA-256 of the checkpoint's files, where they are known."""
    streamed: bool = False
    """Whether the graph's weights are read and written anew, one by one, in place of being referred to."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the checkpoint, read now, and dequantised where it is quantised there.

        Raises:
            SourceError: its parts make no sense.
        """
        held = self.checkpoint.quantized.get(name)
        if held is None:
            return self.part(name)
        return held.dequantize({role: self.part(part) for role, part in held.parts.items()})

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same tensor in pieces along its first axis: one matrix of a quantised stack at a time."""
        held = self.checkpoint.quantized.get(name)
        if held is None or not held.stack:
            yield self.tensor(name)
            return
        for index in range(held.stack):
            yield self.piece(name, index).unsqueeze(0)

    def piece(self, name: str, index: int) -> torch.Tensor:
        """Matrix ``index`` of a quantised stack (``checkpoint.quantized[name].stack`` is their number)."""
        held = self.checkpoint.quantized[name]
        return held.dequantize({role: self.part(part, index) for role, part in held.parts.items()})[0]

    def part(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor as it lies in its file, or its part ``row`` of the first axis, which is kept."""
        from safetensors import safe_open

        with safe_open(self.path(name), framework="pt") as shard:
            return shard.get_tensor(name) if row is None else shard.get_slice(name)[row : row + 1]

    def parts(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Tensors as they lie in their files; each file is opened, and its header read, once."""
        from safetensors import safe_open

        with ExitStack() as stack:
            paths = dict.fromkeys(self.path(name) for name in names)
            opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            return [opened[self.path(name)].get_tensor(name) for name in names]

    def weight(self, name: str) -> torch.Tensor:
        """One weight of the model, read now, in the dtype it is stored in."""
        import torch

        source = self.sources[name]
        if isinstance(source, AsStored):
            return self.tensor(source.tensor)
        if isinstance(source, PerExpert):
            experts = zip(*source.parts, strict=True)
            return torch.stack([torch.cat([self.tensor(n) for n in names]) for names in experts])
        return source.convert({n: self.tensor(n) for n in source.tensors})

    def path(self, name: str) -> Path:
        """The file that a tensor of the checkpoint lies in."""
        return self.checkpoint.folder / self.checkpoint.tensors[name].shard


def stored_weights(model: Any, checkpoint: CheckpointInfo) -> StoredWeights:
    """Where each parameter and persistent buffer comes from; a tied one from where its twin does.

    Args:
        model: a transformers model; its weights are not looked at (they may be on the meta device).

    Raises:
        SourceError: the checkpoint lacks a weight, or has one of another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    wanted: dict[str, Any] = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    gathered: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(checkpoint.weights, key=dot_natural_key):
        target, pattern = _renamed(name, model, renamings, converters, wanted)
        if target in wanted:
            gathered.setdefault(target, {}).setdefault(pattern, []).append(name)
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    sources: dict[str, WeightSource] = {}
    for target, parts in gathered.items():
        patterns = [pattern for pattern in parts if pattern is not None]
        if not patterns:
            sources[target] = AsStored(parts[None][0])
        else:
            sources.update(_through(target, by_pattern[patterns[0]], parts, model))
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name not in sources and other in sources:
            sources[name] = sources[other]
        elif other not in sources and name in sources:  # the checkpoint holds it by its second name
            sources[other] = sources[name]
    _check(wanted, sources, checkpoint)
    return StoredWeights(checkpoint, {name: source for name, source in sources.items() if name in wanted})


def _renamed(
    name: str, model: Any, renamings: list[Any], converters: list[Any], wanted: Mapping[str, Any]
) -> tuple[str, str | None]:
    """As transformers' loader renames, the retry without conversions included."""
    from transformers.core_model_loading import rename_source_key

    prefix = model.base_model_prefix
    renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
    if renamed not in wanted and name in wanted:
        renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
    return renamed, pattern


def _through(
    target: str, converter: Any, parts: Mapping[str | None, list[str]], model: Any
) -> dict[str, WeightSource]:
    """What a conversion makes of ``parts`` (tensor names by source pattern)."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    lists = [tuple(parts[p]) for p in converter.source_patterns if p in parts]
    equal = len({len(names) for names in lists}) == 1
    stacks = operations == [("MergeModulelist", 0)] and len(lists) == 1
    joins = operations == [("MergeModulelist", 0), ("Concatenate", 1)] and equal
    if stacks or joins:
        return {target: PerExpert(tuple(lists))}
    return _converted(target, converter, parts, model)


def _converted(
    target: str, converter: Any, parts: Mapping[str | None, list[str]], model: Any
) -> dict[str, WeightSource]:
    """One source per parameter that the conversion makes; each runs it when it is asked for."""
    import copy

    tensors = tuple(name for names in parts.values() for name in names)

    def run(held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = copy.deepcopy(converter)
        for pattern, names in parts.items():
            for name in names:
                own.add_tensor(target, name, pattern, lambda name=name: held[name])
        made = own.convert(target, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def one(key: str) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
        return lambda held: run(held)[key]

    base = converter.target_patterns[0]
    keys = [target.replace(base, pattern) for pattern in converter.target_patterns]
    if len(keys) == 1 and "*" in keys[0]:
        keys = [key for key in model.state_dict() if _matches(keys[0], key)]
    return {key: Converted(tensors, one(key)) for key in keys}


def _matches(pattern: str, name: str) -> bool:
    import fnmatch

    return fnmatch.fnmatchcase(name, pattern)


def _check(
    wanted: Mapping[str, Any], sources: Mapping[str, WeightSource], checkpoint: CheckpointInfo
) -> None:
    lacking = sorted(name for name in wanted if name not in sources)
    wrong = sorted(
        name
        for name, source in sources.items()
        if name in wanted and _shape(source, checkpoint.weights) not in (None, tuple(wanted[name].shape))
    )
    for names, text in ((lacking, "lack"), (wrong, "have another shape of")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SourceError(
                f"{checkpoint.folder}: the weight files {text} {', '.join(names[:3])}{more}; the model would "
                "run with random values there. Copy the checkpoint again, or correct config.json"
            )


def _shape(
    source: WeightSource, tensors: Mapping[str, TensorInfo | QuantizedTensor]
) -> tuple[int, ...] | None:
    """Shape of the parameter; None where only the conversion knows, () where the parts do not fit."""
    if isinstance(source, AsStored):
        return tensors[source.tensor].shape
    if isinstance(source, Converted):
        return None
    rows = 0
    columns = set()
    for names in source.parts:
        shapes = {tensors[name].shape for name in names}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            return ()
        shape = shapes.pop()
        rows += shape[0]
        columns.add(shape[1])
    return (len(source.parts[0]), rows, columns.pop()) if len(columns) == 1 else ()
