"""The source model as the yardstick: its own eager code in float32, watched, not changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graph.names import nth_call
from ..schema import Manifest
from ..trace import LayerTrace, TracedRun
from .adapted import adapted_blocks, block_input
from .adapters import MoEBlockSpec
from .experts import LAYER_ATTRIBUTE, experts_run_by
from .library_blocks import Routed, library_blocks_watched

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from ..importer.sources import LoadedSource

WATCH_NAME = "moe_export_watch"


class _Recorder:
    def __init__(self) -> None:
        self.layers: list[LayerTrace] = []
        self._calls: Counter[str] = Counter()

    def add(
        self, name: str, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, output: torch.Tensor
    ) -> None:
        """One more layer in the order of execution; the second run of a module is ``name#2``."""
        import torch

        def numpy(t: torch.Tensor, dtype: torch.dtype) -> Any:
            return t.detach().to(dtype).cpu().numpy().copy()

        top_k = ids.shape[-1]
        self._calls[name] += 1
        self.layers.append(
            LayerTrace(
                index=len(self.layers),
                name=nth_call(name, self._calls[name]),
                expert_ids=numpy(ids.reshape(-1, top_k), torch.int32),
                weights=numpy(weights.reshape(-1, top_k), torch.float32),
                hidden=numpy(hidden.reshape(-1, hidden.shape[-1]), torch.float32),
                output=numpy(output.reshape(-1, output.shape[-1]), torch.float32),
            )
        )

    def add_routed(self, name: str, routed: Routed) -> None:
        """The same for a block that is not behind the experts interface."""
        self.add(name, routed.hidden, routed.expert_ids, routed.weights, routed.output)


def _watch_experts(recorder: _Recorder) -> Callable[..., torch.Tensor]:
    def watch(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
        original = type(self).forward.__wrapped__
        output: torch.Tensor = original(self, hidden_states, top_k_index, top_k_weights)
        recorder.add(getattr(self, LAYER_ATTRIBUTE), hidden_states, top_k_index, top_k_weights, output)
        return output

    return watch


def _run_experts(
    block: nn.Module, spec: MoEBlockSpec, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Sum over each token's experts, by the block's own expert modules, one expert at a time."""
    import torch

    out = torch.zeros_like(hidden)
    for number, expert in enumerate(spec.expert_list(block)):
        token, k = torch.where(ids == number)
        if len(token):
            out.index_add_(0, token, expert(hidden[token]) * weights[token, k, None].to(hidden.dtype))
    return out


def _watch_block(recorder: _Recorder, name: str, spec: MoEBlockSpec) -> Callable[..., None]:
    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any) -> None:
        import torch

        hidden = block_input(args, kwargs)
        with torch.no_grad():
            flat = hidden.reshape(-1, hidden.shape[-1])
            weights, ids = spec.routing(block, hidden)
            recorder.add(name, flat, ids, weights, _run_experts(block, spec, flat, weights, ids))

    return record


@contextmanager
def watching(model: nn.Module) -> Iterator[_Recorder]:
    """Inside, every MoE layer of ``model`` records what it routes and computes; the model's own code runs."""
    recorder = _Recorder()
    with ExitStack() as stack:
        for name, (block, spec) in adapted_blocks(model).items():
            hook = block.register_forward_hook(_watch_block(recorder, name, spec), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(experts_run_by(model, WATCH_NAME, _watch_experts(recorder)))
        stack.enter_context(library_blocks_watched(model, recorder.add_routed))
        yield recorder


class ReferenceModel:
    """A loaded source model behind :class:`moe_export.trace.Reference`."""

    def __init__(self, source: LoadedSource) -> None:
        self.source = source

    def run(self, inputs: dict[str, NDArray[np.generic]]) -> TracedRun:
        """One full forward in float32 with the model's own code; see :class:`moe_export.trace.Reference`."""
        import torch

        from ..importer.graphs import run_module

        tensors = {name: torch.from_numpy(value.copy()) for name, value in inputs.items()}
        model = self.source.module
        with torch.no_grad(), watching(model) as recorder:
            if self.source.kind == "huggingface":
                outputs = self._run_library(model, tensors)
            else:
                outputs = run_module(model, {n: _as_float32(t) for n, t in tensors.items()})
        numbers = {
            name: t.detach().float().cpu().numpy() if t.is_floating_point() else t.cpu().numpy()
            for name, t in outputs.items()
        }
        return TracedRun(outputs=numbers, layers=tuple(recorder.layers))

    def _run_library(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from ..importer.graphs import feature_output, forward_parameters

        parameters = forward_parameters(model)
        if (
            "position_ids" in parameters
            and "position_ids" not in tensors
            and "decoder_input_ids" not in tensors
        ):
            tensors["position_ids"] = positions_from_mask(tensors["attention_mask"])
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        result = model(**{k: v for k, v in tensors.items() if k in parameters}, **extra)
        generates = self.source.task == "text-generation"
        name = "logits" if generates else feature_output(model, result)
        return {name: result[name]}


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Inputs of a float16 engine as the float32 model takes them."""
    import torch

    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def positions_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token among the unmasked ones of its row; 0 at padding. [batch, sequence] int64."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return positions * mask


def named_outputs(result: Any) -> dict[str, Any]:
    """Outputs of a user's module by the names its engine has."""
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if isinstance(result, (tuple, list)):
        return {f"output_{i}": value for i, value in enumerate(result)}
    return {} if result is None else {"output": result}


def load_reference(path: str | Path, manifest: Manifest) -> ReferenceModel:
    """Load the source a bundle was built from (or another one to compare with) as the reference.

    Raises:
        SourceError: the source cannot be read or is of another kind than the bundle's.
    """
    from ..importer.sources import load_source

    return ReferenceModel(load_source(str(path), task=manifest.task, layers=manifest.source.layers))
