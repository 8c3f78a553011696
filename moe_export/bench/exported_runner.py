"""transformers' own ONNX exporter, and what it exports run in ONNX Runtime, as contestants."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runner import NotPossible, Runner
from .torch_runner import TorchRunner

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort
    from numpy.typing import NDArray

    from .runner import Inputs

PLAIN, FUSED = "plain", "fused"
_CACHE_IN, _CACHE_OUT = "input.", "output."


class TransformersExport(TorchRunner):
    """Not a contestant: ``load`` exports the source once, as it is and with ONNX Runtime's fusions, into
    ``folder``.

    For a model with a cache that is one graph for prefill and one for a decode step, as
    ``export_for_generation`` makes by default; the fused forms are made from the same trace.
    """

    def __init__(
        self, source: Any, task: str, threads: int, folder: str, cached: bool, layers: int | None = None
    ) -> None:
        super().__init__(source, task, threads, layers=layers)
        self._folder = Path(folder)
        self._cached = cached

    def load(self) -> dict[str, Any]:
        super().load()
        if self.loaded.kind != "huggingface":
            raise NotPossible("transformers exports its own models only")
        import torch
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
        from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

        model = self.loaded.module
        start = time.perf_counter()
        ids = torch.arange(22).reshape(2, 11) % 2 + 3
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        exporter, config = OnnxExporter(), OnnxConfig(dynamic=True)
        if self._cached:
            exported = exporter.export_for_generation(model, sample, config)
        else:
            if self.loaded.encoder_decoder:
                sample["decoder_input_ids"] = ids[:, :7].contiguous()
            exported = exporter.export(model, sample, config)
        exported.save_pretrained(self._folder / PLAIN)
        seconds = time.perf_counter() - start
        for component in exported.components.values():
            fuse_for_onnxruntime(component.program, "cpu")
        exported.save_pretrained(self._folder / FUSED)
        return {"seconds": time.perf_counter() - start, "plain_seconds": seconds}


class _Graph:
    """One ONNX file in ONNX Runtime; inputs and outputs stay bound values, nothing is copied."""

    def __init__(self, path: Path, threads: int) -> None:
        from ..backends.onnxruntime.runner import create_session

        self._session: ort.InferenceSession = create_session(path, threads=threads)
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        """OrtValues by input name → OrtValues by output name."""
        binding = self._session.io_binding()
        for name in self.inputs:
            if name not in values:
                raise NotPossible(f"its graph takes an input {name!r}, which this benchmark cannot supply")
            binding.bind_ortvalue_input(name, values[name])
        for name in self.outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))


class ExportedRunner(Runner):
    """Runs what :class:`TransformersExport` left in ``folder``, with the same session options as our
    engine."""

    def __init__(self, folder: str, threads: int) -> None:
        self._folder = Path(folder)
        self._threads = threads
        self._graphs: dict[str, _Graph] = {}
        self._cache: dict[str, Any] = {}
        self._past = 0

    def load(self) -> dict[str, Any]:
        start = time.perf_counter()
        for path in sorted(self._folder.glob("*.onnx")):
            self._graphs[path.stem] = _Graph(path, self._threads)
        seconds = time.perf_counter() - start
        notes = []
        if "decode" in self._graphs:
            notes.append("two graphs, prefill and decode, each with its own copy of the weights")
            lost = [n for n, g in self._graphs.items() if "attention_mask" not in g.inputs]
            if lost:
                notes.append(
                    f"its graphs take no attention mask ({', '.join(lost)}): padding would be read as text"
                )
        return {"seconds": seconds, "notes": notes}

    def prefill(self, ids: NDArray[np.int64]) -> Any:
        self._past = 0
        return self._run_text("prefill", ids, {})

    def step(self, ids: NDArray[np.int64]) -> Any:
        return self._run_text("decode", ids, self._cache)

    def _run_text(self, name: str, ids: NDArray[np.int64], cache: dict[str, Any]) -> Any:
        import numpy as np

        if name not in self._graphs:
            raise NotPossible(f"transformers exported no {name} graph, only {', '.join(self._graphs)}")
        graph = self._graphs[name]
        batch, new = ids.shape
        total = self._past + new
        feeds = {
            "input_ids": ids,
            "position_ids": np.broadcast_to(np.arange(self._past, total), (batch, new)),
            "attention_mask": np.ones((batch, total), np.int64),
            "cache_position": np.arange(self._past, total),
        }
        values = {n: _value(a) for n, a in feeds.items() if n in graph.inputs}
        values.update({f"{_CACHE_IN}{n}": v for n, v in cache.items()})
        out = graph.run(values)
        self._cache = {n.removeprefix(_CACHE_OUT): v for n, v in out.items() if n != "logits"}
        self._past = total
        return out["logits"]

    def forward(self, inputs: Inputs) -> Any:
        graph = self._graphs["model"]
        out = graph.run({n: _value(a) for n, a in inputs.items() if n in graph.inputs})
        return out[next(n for n in ("logits", "last_hidden_state", *graph.outputs) if n in out)]

    def numpy(self, result: Any) -> NDArray[np.float32]:
        import numpy as np

        return np.asarray(result.numpy(), np.float32)


def _value(array: NDArray[Any]) -> Any:
    import numpy as np
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
