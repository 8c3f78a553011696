"""What every contestant can do, and what a worker does with it. Runs in the contestant's own process."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..process_memory import peak_rss_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Inputs = dict[str, NDArray[Any]]
    Routing = tuple[NDArray[np.int32], NDArray[np.float32]]

CHECK_STEPS = 2
"""Decode steps of the sanity check."""


class NotPossible(Exception):
    """A contestant cannot do this; the text says why. It becomes a "skipped" entry, never a silent gap."""


class Runner(ABC):
    """One way to run one model. A text model with a cache has :meth:`prefill` and :meth:`step`, any other
    :meth:`forward`. Every method returns when its result is complete in memory."""

    @abstractmethod
    def load(self) -> dict[str, Any]:
        """Get ready. Returns ``seconds`` and, where they apply, ``notes`` (list of str) and ``source_hash``.

        Raises:
            NotPossible: this contestant cannot run here, for the reason given.
        """

    def prefill(self, ids: NDArray[np.int64]) -> Any:
        """Start from an empty cache with ``ids`` [batch, sequence] → logits [batch, sequence, vocab]."""
        raise NotPossible("it has no run with a KV cache")

    def step(self, ids: NDArray[np.int64]) -> Any:
        """Append ``ids`` [batch, 1] to the cache → logits [batch, 1, vocab]."""
        raise NotPossible("it has no run with a KV cache")

    def forward(self, inputs: Inputs) -> Any:
        """One run without cache → the first output."""
        raise NotPossible("it has no run without a KV cache")

    def force(self, routing: list[Routing] | None) -> None:
        """From now on use these ids and weights, one pair per MoE layer (None: the model's own again).

        Raises:
            NotPossible: it cannot replace its routing.
        """
        if routing is not None:
            raise NotPossible("its routing cannot be replaced")

    def routing(self, inputs: Inputs) -> list[NDArray[np.int32]] | None:
        """Expert ids [T, K] per layer that the model chooses for ``inputs``; None where it does not tell."""
        return None

    def numpy(self, result: Any) -> NDArray[np.float32]:
        """A result as an array."""
        import numpy as np

        return np.asarray(result, np.float32)


class Host:
    """Carries out the requests of the benchmark on one runner; values are JSON, arrays go through ``.npz``
    files."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer ``request`` (its ``op`` names the method).

        Raises:
            NotPossible: the runner cannot do it.
        """
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self._load,
            "check": self._check,
            "measure": self._measure,
            "routing": self._routing,
            "memory": self._memory,
        }
        values = dict(request)
        return operations[values.pop("op")](**values)

    def _load(self) -> dict[str, Any]:
        return self._runner.load()

    def _memory(self) -> dict[str, Any]:
        return {"peak_rss": peak_rss_bytes()}

    def _check(self, inputs: str, output: str) -> dict[str, Any]:
        """Run the sanity check's inputs and write what came out; also times the very first run."""
        import numpy as np

        arrays = read_arrays(inputs)
        start = time.perf_counter()
        if "next_ids" in arrays:
            first = self._runner.prefill(arrays["input_ids"])
            seconds = time.perf_counter() - start
            results = {"prefill": self._runner.numpy(first).copy()}
            for i in range(CHECK_STEPS):
                start = time.perf_counter()
                logits = self._runner.step(arrays["next_ids"][:, i : i + 1])
                if i == 0:
                    seconds += time.perf_counter() - start
                results[f"step{i}"] = self._runner.numpy(logits).copy()
        else:
            result = self._runner.forward(arrays)
            seconds = time.perf_counter() - start
            results = {"forward": self._runner.numpy(result).copy()}
        np.savez(output, **results)  # type: ignore[arg-type]
        return {"seconds": seconds}

    def _measure(self, phase: str, inputs: str, repeats: int, forced: str = "") -> dict[str, Any]:
        """Seconds of ``repeats`` runs; of every step in decode. One untimed run warms the caches first.
        ``sample`` holds a few numbers of the last result."""
        arrays = read_arrays(inputs)
        self._runner.force(_read_routing(forced) if forced else None)
        try:
            seconds, result = self._times(phase, arrays, repeats)
            return {"seconds": seconds, "sample": sample_of(self._runner.numpy(result))}
        finally:
            self._runner.force(None)

    def _times(self, phase: str, arrays: Inputs, repeats: int) -> tuple[list[float], Any]:
        seconds: list[float] = []
        result: Any = None
        gc.collect()
        gc.disable()
        try:
            for i in range(repeats + (phase != "decode")):
                if phase == "decode":
                    self._runner.prefill(arrays["input_ids"])
                    for t in range(arrays["next_ids"].shape[1]):
                        ids = arrays["next_ids"][:, t : t + 1].copy()
                        start = time.perf_counter()
                        result = self._runner.step(ids)
                        seconds.append(time.perf_counter() - start)
                    continue
                start = time.perf_counter()
                if phase == "prefill":
                    result = self._runner.prefill(arrays["input_ids"])
                else:
                    result = self._runner.forward(arrays)
                if i > 0:
                    seconds.append(time.perf_counter() - start)
        finally:
            gc.enable()
        return seconds, result

    def _routing(self, inputs: str, output: str) -> dict[str, Any]:
        import numpy as np

        ids = self._runner.routing(read_arrays(inputs))
        if ids is None:
            return {"layers": 0}
        np.savez(output, **{str(i): layer for i, layer in enumerate(ids)})  # type: ignore[arg-type]
        return {"layers": len(ids)}


def sample_of(result: NDArray[np.float32]) -> list[float]:
    """Up to 64 numbers spread over the last rows of a result [batch, ..., N]."""
    import numpy as np

    last = result.reshape(-1, result.shape[-1])[-4:].reshape(-1) if result.ndim > 1 else result.reshape(-1)
    places = np.linspace(0, max(last.size - 1, 0), min(64, last.size)).astype(np.int64)
    return [float(v) for v in last[places]]


def read_arrays(path: str | Path) -> Inputs:
    """Arrays of an ``.npz`` file by name; pickled content is refused."""
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write_routing(path: str | Path, routing: list[Routing]) -> None:
    """Write a forced routing for the ``measure`` request."""
    import numpy as np

    arrays = {
        f"{kind}{i}": a
        for i, pair in enumerate(routing)
        for kind, a in zip(("ids", "weights"), pair, strict=True)
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _read_routing(path: str) -> list[Routing]:
    arrays = read_arrays(path)
    return [(arrays[f"ids{i}"], arrays[f"weights{i}"]) for i in range(len(arrays) // 2)]
