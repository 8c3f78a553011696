"""The modules that are traced: a model with flat inputs and outputs, one class per kind of task."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MoeExportError, UsageError
from ..models.reference import named_outputs
from ..schema import ModelIO, TensorSpec
from .cache import CacheSlot, fill_cache, plan_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sizes of the traced sample: pairwise different, so that no two symbolic dimensions are taken for one.
BATCH, SEQUENCE, PAST = 3, 5, 11


@dataclass(frozen=True)
class TracedGraph:
    """What is traced: the module, sample inputs in the order of ``io.inputs``, and names."""

    module: nn.Module
    sample: tuple[torch.Tensor, ...]
    io: ModelIO

    @property
    def subject(self) -> str:
        """Class of the model, for messages."""
        return type(getattr(self.module, "model", self.module)).__name__


def forward_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of ``model.forward``."""
    return set(inspect.signature(model.forward).parameters)


def vocabulary(model: PreTrainedModel) -> int:
    """Number of token ids the model embeds."""
    return int(model.get_input_embeddings().weight.shape[0])


def _numpy_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class DecoderGraph(nn.Module):
    """A causal language model: ids, mask, positions and flat cache in; logits and flat cache out."""

    def __init__(self, model: PreTrainedModel, slots: tuple[CacheSlot, ...], with_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.slots = slots
        self.with_positions = with_positions

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *rest: torch.Tensor) -> Any:
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        past = rest
        if self.with_positions:
            arguments["position_ids"], past = rest[0], rest[1:]
        growing = [
            t.shape[s.past_axis] for s, t in zip(self.slots, past, strict=True) if s.past_axis is not None
        ]
        if growing:
            torch._check(attention_mask.shape[1] == growing[0] + input_ids.shape[1])
        cache = fill_cache(self.model, self.slots, past)
        logits = self.model(**arguments, past_key_values=cache, use_cache=True).logits
        return (logits, *(slot.read(cache) for slot in self.slots))


class PlainGraph(nn.Module):
    """A model without cache: named tensors in, one named output out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str, extra: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.output = output
        self.extra = extra

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        result = self.model(**dict(zip(self.names, tensors, strict=True)), **self.extra)
        value: torch.Tensor = result[self.output]
        return value


class ModuleGraph(nn.Module):
    """A user's own module: its keyword inputs in order; tensor, tuple or dict of tensors out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> Any:
        result = self.model(**dict(zip(self.names, tensors, strict=True)))
        return tuple(named_outputs(result).values())


def _ids(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary(model), shape, generator=generator)


def decoder_graph(model: PreTrainedModel) -> TracedGraph:
    """Trace plan of a causal language model with its KV cache as flat inputs and outputs."""
    probe = {"input_ids": _ids(model, 2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    slots = plan_cache(model, probe)
    with_positions = "position_ids" in forward_parameters(model)
    grows = any(slot.past_axis is not None for slot in slots)
    inputs = [
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
        TensorSpec("attention_mask", "int64", ("batch", "total" if grows else "sequence"), "mask"),
    ]
    past = PAST if grows else 0
    sample = [_ids(model, BATCH, SEQUENCE), torch.ones(BATCH, past + SEQUENCE, dtype=torch.int64)]
    if with_positions:
        inputs.append(TensorSpec("position_ids", "int64", ("batch", "sequence"), "positions"))
        sample.append(torch.arange(past, past + SEQUENCE).expand(BATCH, SEQUENCE).contiguous())
    with torch.no_grad():  # the head may be wider than the logits, which some families cut to the vocabulary
        logits = model(**probe, use_cache=False).logits
    width = int(logits.shape[-1])
    outputs = [TensorSpec("logits", _numpy_name(logits.dtype), ("batch", "sequence", width), "logits")]
    generator = torch.Generator().manual_seed(1)
    for slot in slots:
        shape = slot.symbolic_shape
        inputs.append(TensorSpec(slot.input_name, _numpy_name(slot.dtype), shape, "cache", slot.output_name))
        present = tuple("total" if d == "past" else d for d in shape)
        outputs.append(
            TensorSpec(slot.output_name, _numpy_name(slot.dtype), present, "cache", slot.input_name)
        )
        sizes = [BATCH if d == "batch" else PAST if d == "past" else int(d) for d in shape]
        sample.append(torch.randn(sizes, generator=generator).to(slot.dtype))
    return TracedGraph(
        DecoderGraph(model, slots, with_positions), tuple(sample), ModelIO(tuple(inputs), tuple(outputs))
    )


def feature_output(model: PreTrainedModel, results: Any) -> str:
    """What feature extraction reads from a model's ``results``: hidden states, or a classifier's logits."""
    classifier = model.get_output_embeddings() is None and "logits" in results
    return "logits" if classifier and "last_hidden_state" not in results else "last_hidden_state"


def plain_graph(model: PreTrainedModel, output: str, *, encoder_decoder: bool = False) -> TracedGraph:
    """Trace plan without cache: ``output`` is ``logits`` or ``last_hidden_state``; a classifier without a
    language-model head gives its ``logits`` instead of hidden states.
    """
    inputs = [
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
        TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
    ]
    sample = [_ids(model, BATCH, SEQUENCE), torch.ones(BATCH, SEQUENCE, dtype=torch.int64)]
    length: str = "sequence"
    if encoder_decoder:
        length = "decoder_sequence"
        inputs.append(TensorSpec("decoder_input_ids", "int64", ("batch", length), "token_ids"))
        sample.append(_ids(model, BATCH, PAST))
    parameters = forward_parameters(model)
    kept = [i for i, spec in enumerate(inputs) if spec.name in parameters]
    inputs, sample = [inputs[i] for i in kept], [sample[i] for i in kept]
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    with torch.no_grad():
        names = tuple(spec.name for spec in inputs)
        results = model(**dict(zip(names, sample, strict=True)), **extra)
    output = feature_output(model, results) if output == "last_hidden_state" else output
    result = results[output]
    role = "logits" if output == "logits" else "hidden"
    outputs = (TensorSpec(output, _numpy_name(result.dtype), ("batch", length, int(result.shape[-1])), role),)
    return TracedGraph(
        PlainGraph(model, names, output, extra), tuple(sample), ModelIO(tuple(inputs), outputs)
    )


def module_graph(
    model: nn.Module, inputs: dict[str, torch.Tensor], dynamic: dict[str, dict[int, str]]
) -> TracedGraph:
    """Trace plan of a user's own module; ``dynamic`` maps input name → {axis: symbolic name}."""
    specs = []
    for name, tensor in inputs.items():
        axes = dynamic.get(name, {})
        shape = tuple(axes.get(axis, int(size)) for axis, size in enumerate(tensor.shape))
        specs.append(TensorSpec(name, _numpy_name(tensor.dtype), shape))
    outputs = tuple(
        TensorSpec(name, _numpy_name(t.dtype), ("?",) * t.dim())
        for name, t in run_module(model, inputs).items()
    )
    return TracedGraph(
        ModuleGraph(model, tuple(inputs)), tuple(inputs.values()), ModelIO(tuple(specs), outputs)
    )


def run_module(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a user's own module on its inputs; outputs by name.

    Raises:
        UsageError: it does not take these inputs, fails, or returns something else than tensors.
    """
    cls = type(model).__name__
    try:
        with torch.no_grad():
            result = model(**inputs)
    except MoeExportError:
        raise
    except Exception as error:  # the user's own code
        taken = ", ".join(sorted(forward_parameters(model)))
        raise UsageError(
            f"{cls} fails on its sample inputs ({', '.join(inputs)}; its forward takes {taken}): "
            f"{type(error).__name__}: {error}"
        ) from error
    named = named_outputs(result)
    if not named:
        raise UsageError(f"{cls} returns nothing; expected a tensor, or a tuple or dict of tensors")
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"{cls}: {name} is {type(value).__name__}; expected a tensor, or a tuple or dict of tensors"
            )
        if name in inputs or not name:
            raise UsageError(
                f"{cls}: output {name!r} has the name of an input; an engine needs different names"
                if name
                else f"{cls}: an output has an empty name"
            )
    return named
