"""The source model in PyTorch, eager or compiled, as a contestant."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..process_memory import reset_peak
from ..progress import NullProgress
from .runner import NotPossible, Runner, read_arrays

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ..importer.sources import LoadedSource
    from .runner import Inputs, Routing

LOAD_STAGE = "load the source model"
FORCED_NAME = "moe_export_bench_forced"


class LoadTimer(NullProgress):
    """Times the one stage of ``load_source`` that makes the model; hashing and checking are not part of
    loading."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        if name == LOAD_STAGE:
            reset_peak()
        start = time.perf_counter()
        yield lambda _units: None
        if name == LOAD_STAGE:
            self.seconds = time.perf_counter() - start


class TorchRunner(Runner):
    """PyTorch eager with the model's default settings, in float32. All tokens are real, so no mask is
    passed."""

    def __init__(
        self, source: Any, task: str, threads: int, sample: str | None = None, layers: int | None = None
    ) -> None:
        """``sample``: an ``.npz`` file of sample inputs, which a live module of one's own needs. ``layers``:
        take the source's first so many layers only."""
        self._layers = layers
        self._source = source
        self._sample = sample
        self._task = task
        self._threads = threads
        self._loaded: LoadedSource | None = None
        self._call: Callable[..., Any] | None = None
        self._cache: Any = None
        self._plan: list[Routing] | None = None
        self._usual: Any = None

    @property
    def loaded(self) -> LoadedSource:
        """The loaded source.

        Raises:
            RuntimeError: :meth:`load` was not called.
        """
        if self._loaded is None:
            raise RuntimeError("the model was not loaded")
        return self._loaded

    def load(self) -> dict[str, Any]:
        import torch

        from ..importer.sources import load_source

        torch.set_num_threads(self._threads)
        timer = LoadTimer()
        start = time.perf_counter()
        task = None if self._task == "module" else self._task
        inputs = None
        if self._sample is not None:
            inputs = {name: torch.from_numpy(array) for name, array in read_arrays(self._sample).items()}
        self._loaded = load_source(
            self._source, task=task, inputs=inputs, layers=self._layers, progress=timer
        )
        seconds = time.perf_counter() - start
        self._call = self._loaded.module
        return {"seconds": timer.seconds or seconds, "source_hash": self._loaded.info.hash}

    def prefill(self, ids: NDArray[np.int64]) -> Any:
        self._cache = None
        return self._run_cached(ids)

    def step(self, ids: NDArray[np.int64]) -> Any:
        return self._run_cached(ids)

    def _run_cached(self, ids: NDArray[np.int64]) -> Any:
        import torch

        assert self._call is not None
        with torch.inference_mode():
            out = self._call(input_ids=torch.from_numpy(ids), past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        return out.logits

    def forward(self, inputs: Inputs) -> Any:
        import torch

        from ..importer.graphs import forward_parameters
        from ..models.reference import named_outputs

        assert self._call is not None
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.inference_mode():
            if self.loaded.kind != "huggingface":
                return next(iter(named_outputs(self._call(**tensors)).values()))
            parameters = forward_parameters(self.loaded.module)
            extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
            out = self._call(**{k: v for k, v in tensors.items() if k in parameters}, **extra)
        return out[next(n for n in ("logits", "last_hidden_state") if n in out)]

    def numpy(self, result: Any) -> NDArray[np.float32]:
        array: NDArray[np.float32] = result.detach().float().cpu().numpy()
        return array

    def force(self, routing: list[Routing] | None) -> None:
        from ..models.experts import is_experts_module

        model: Any = self.loaded.module
        if routing is None:
            if self._plan is not None:
                model.set_experts_implementation(self._usual)
                self._plan = None
            return
        experts = [m for m in model.modules() if is_experts_module(m)]
        if len(experts) != len(routing):
            raise NotPossible(
                f"{len(experts)} of its {len(routing)} MoE layers use transformers' experts interface"
            )
        import torch
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        # By identity: each experts module with its routing and the implementation it runs usually.
        plans = {
            id(module): (*map(torch.from_numpy, pair), module.config._experts_implementation)
            for module, pair in zip(experts, routing, strict=True)
        }
        self._usual = model.get_experts_implementation()

        def forced(self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
            new_ids, new_weights, usual = plans[id(self)]
            if new_ids.shape != ids.shape:
                raise NotPossible(
                    f"its experts take routing of shape {tuple(ids.shape)}, not {tuple(new_ids.shape)}"
                )
            run = ALL_EXPERTS_FUNCTIONS.get_interface(usual, type(self).forward.__wrapped__)
            return run(self, hidden, new_ids.to(ids.dtype), new_weights.to(weights.dtype))

        ALL_EXPERTS_FUNCTIONS.register(FORCED_NAME, forced)
        self._plan = routing
        model.set_experts_implementation(FORCED_NAME)


class CompiledRunner(TorchRunner):
    """The same through ``torch.compile`` with dynamic shapes. Compiling happens in its first runs."""

    def load(self) -> dict[str, Any]:
        import torch

        found = super().load()
        # A shape that does not fit what was compiled before is compiled again, up to this often.
        torch._dynamo.config.recompile_limit = 32
        self._call = torch.compile(self.loaded.module, dynamic=True)
        return {**found, "notes": ["dynamic shapes; compile time is in the first run"]}

    def force(self, routing: list[Routing] | None) -> None:
        if routing is not None:
            raise NotPossible("its compiled code has the model's own routing inside")
