"""A bundle of a TensorRT target without its GPU: the lowered graph, run on the CPU as an engine is run.

*Simulated, not run on a GPU*: it shows that the graph which TensorRT is given computes what the source model
computes, sizes of buckets and their re-runs included. It does not show what TensorRT makes of the graph.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..bundle.reader import open_bundle
from ..errors import InputError, UsageError
from ..schema import Limits
from ..sms import GPU_TARGETS
from .merged_session import merged_bundle
from .result import SIMULATED
from .simulated_plugin import run_plugin

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from ..bundle.reader import Bundle
    from ..runtime.capacity import CapacityUse
    from ..schema import Manifest, ModelIO
    from ..trace import LayerTrace, TracedRun
    from .simulated_graph import PluginOp, SimulatedGraph

    Array = NDArray[Any]


PLUGIN_LIMITS = Limits(2, 24)
"""Largest batch and sequence of a graph with plugin nodes: one run of more takes minutes."""


def load_simulated(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    threads: int | None = None,
    plugin: PluginOp = run_plugin,
) -> SimulatedSession:
    """Open a bundle of a TensorRT target for runs on the CPU.

    Raises:
        BundleError: the bundle is damaged or does not load.
        UsageError: it is of another target.
    """
    return SimulatedSession(open_bundle(path, trust=trust), threads=threads, plugin=plugin)


class SimulatedSession:
    """What verification needs of a :class:`moe_export.runtime.session.Session`; one thread uses it."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, plugin: PluginOp = run_plugin) -> None:
        from ..runtime.capacity import CapacityRunner, bucket_io, own_io
        from ..runtime.inputs import InputChecker

        whole = bundle.manifest
        if whole.target not in GPU_TARGETS:
            raise UsageError(
                f"{bundle.path} is for target {whole.target}, which runs on the CPU itself; --simulate is "
                f"for {', '.join(GPU_TARGETS)}"
            )
        self._folder = ExitStack()
        if whole.expert_parallel is not None:
            bundle = self._folder.enter_context(merged_bundle(bundle))
        self._bundle, self._threads, self._plugin = bundle, threads, plugin
        self._graphs: dict[str, SimulatedGraph] = {}
        self.plugin_nodes = self._graph("plain").plugin_nodes
        limits = _smaller(whole.limits) if self.plugin_nodes else whole.limits
        self.manifest: Manifest = dataclasses.replace(whole, io=own_io(whole.io), limits=limits)
        """Its inputs and outputs are the model's own, without those that size buckets."""
        self._buckets = bucket_io(whole.io)
        self._capacity = CapacityRunner.of(whole)
        vocabulary = whole.text.vocab_size if whole.text is not None else None
        self._checker = InputChecker(self.manifest.io, limits, vocabulary)

    @property
    def io(self) -> ModelIO:
        """Inputs and outputs of the model."""
        return self.manifest.io

    @property
    def capacity_use(self) -> CapacityUse | None:
        """How often buckets were too small; None for a graph without them."""
        return None if self._buckets is None else self._capacity.use

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer; None where it has none."""
        from ..runtime.text import load_tokenizer

        folder = self._bundle.tokenizer_path
        file = None if folder is None else folder / "tokenizer.json"
        return load_tokenizer(file) if file is not None and file.is_file() else None

    def __enter__(self) -> SimulatedSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graphs.clear()
        self._folder.close()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """All outputs of the model, caches included. Inputs are checked as a session does."""
        return self._execute("plain", self._checker.check(inputs).feeds)

    def run_traced(
        self, inputs: Mapping[str, Any], *, force_routing: Sequence[LayerTrace] | None = None
    ) -> TracedRun:
        """Run once and show every MoE layer; ``force_routing`` replaces the routers' choices."""
        from ..runtime import instrument
        from ..trace import TracedRun

        layers = self.manifest.moe_layers
        feeds = self._checker.check(inputs).feeds
        forced: dict[str, Array] = {}
        if force_routing is not None:
            instrument.check_routing(layers, force_routing)
            forced = instrument.forced_feeds(layers, force_routing, self._dtypes("forced"))
        form = "plain" if not layers else "traced" if force_routing is None else "forced"
        outputs = self._execute(form, {**feeds, **forced})
        traces = instrument.layer_traces(layers, {**outputs, **forced})
        return TracedRun({spec.name: outputs[spec.name] for spec in self.io.outputs}, traces)

    def chunked_logits(self, input_ids: Any, attention_mask: Any, chunks: Sequence[int]) -> TracedRun:
        """Feed a sequence through the KV cache in pieces; as :meth:`Session.chunked_logits`."""
        import numpy as np

        from ..trace import TracedRun
        from .engine_runs import join_layers

        if not self.io.cache_inputs:
            raise InputError("this engine has no KV cache to feed in chunks; use run_traced()")
        known = {spec.name for spec in self.io.inputs}
        ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
        caches: dict[str, Array] = {}
        logits, traces = [], []
        begin = 0
        for size in chunks:
            end = begin + size
            new = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
            run = self.run_traced({**{k: v for k, v in new.items() if k in known}, **caches})
            caches = {spec.name: run.outputs[str(spec.pair)] for spec in self.io.cache_inputs}
            logits.append(run.outputs["logits"])
            traces.append(run.layers)
            begin = end
        layers = tuple(join_layers(parts, len(ids)) for parts in zip(*traces, strict=True))
        return TracedRun({"logits": np.concatenate(logits, axis=1)}, layers)

    def notes(self) -> list[str]:
        """What a report says of the simulation so far."""
        made = [f"{SIMULATED}: the lowered graph in ONNX Runtime on the CPU"]
        if self.plugin_nodes:
            made.append(
                f"{self.plugin_nodes} plugin nodes ran by the GPU's own kernels under Triton's interpreter, "
                f"which is slow: inputs are of at most {PLUGIN_LIMITS.max_batch} sequences of "
                f"{PLUGIN_LIMITS.max_sequence} tokens"
            )
        if self.capacity_use is not None:
            made.append(f"buckets: {self.capacity_use.text()}")
        return made

    def _execute(self, form: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        from ..runtime.capacity import count_tokens, load_of

        graph, buckets = self._graph(form), self._buckets
        if buckets is None:
            return graph.run(feeds)

        def once(capacity: int) -> tuple[dict[str, Array], int]:
            import numpy as np

            outputs = graph.run({**feeds, buckets.capacity.name: np.zeros(capacity, np.int32)})
            return outputs, load_of(outputs[buckets.load.name])

        tokens = count_tokens(self.io, {name: array.shape for name, array in feeds.items()})
        return self._capacity.run(tokens, once)

    def _dtypes(self, form: str) -> dict[str, np.dtype[Any]]:
        import onnx

        kinds = self._graph(form).inputs
        return {name: onnx.helper.tensor_dtype_to_np_dtype(kind) for name, kind in kinds.items()}

    def _graph(self, form: str) -> SimulatedGraph:
        """``plain``, ``traced`` (MoE values are outputs) or ``forced`` (routing is an input)."""
        import onnx

        from ..runtime.instrument import traced_model
        from .simulated_graph import SimulatedGraph

        if form not in self._graphs:
            path = self._bundle.model_path
            if form == "plain":
                model = onnx.load(path, load_external_data=False)
            else:
                layers = self._bundle.manifest.moe_layers
                text = traced_model(path, layers, force_routing=form == "forced")
                model = onnx.load_from_string(text)
            self._graphs[form] = SimulatedGraph(model, path.parent, str(path), self._plugin, self._threads)
        return self._graphs[form]


def _smaller(limits: Limits) -> Limits:
    """``limits``, but no more than :data:`PLUGIN_LIMITS`."""

    def least(own: int | None, most: int | None) -> int | None:
        return most if own is None or most is None else min(own, most)

    return Limits(
        least(limits.max_batch, PLUGIN_LIMITS.max_batch),
        least(limits.max_sequence, PLUGIN_LIMITS.max_sequence),
    )
