"""The bundle's engine as a contestant, run as ``Session.generate`` and ``Session.run`` run it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..errors import BundleError
from .runner import NotPossible, Runner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..runtime.session import Session
    from ..runtime.stepping import Stepper
    from .runner import Inputs, Routing


class EngineRunner(Runner):
    """A loaded bundle. Hashes are not checked again: the benchmark checked them before it started."""

    def __init__(self, bundle: str, threads: int | None) -> None:
        self._bundle = bundle
        self._threads = threads
        self._session: Session | None = None
        self._stepper: Stepper | None = None
        self._forced: _ForcedEngine | _ForcedRanks | None = None
        self._routing: list[Routing] | None = None

    @property
    def session(self) -> Session:
        """The session.

        Raises:
            RuntimeError: :meth:`load` was not called.
        """
        if self._session is None:
            raise RuntimeError("the bundle was not loaded")
        return self._session

    def load(self) -> dict[str, Any]:
        from ..runtime.session import load

        start = time.perf_counter()
        self._session = load(self._bundle, trust=True, threads=self._threads)
        return {"seconds": time.perf_counter() - start}

    def prefill(self, ids: NDArray[np.int64]) -> Any:
        import numpy as np

        from ..runtime.stepping import LOGITS

        session = self.session
        if self._routing is not None:
            return self._run_forced({"input_ids": ids})
        # The loop of generate() uses the same object; here no sampling stands between two steps.
        self._stepper = session.stepper(len(ids))
        return self._stepper.feed(ids, np.ones_like(ids))[LOGITS]

    def step(self, ids: NDArray[np.int64]) -> Any:
        import numpy as np

        from ..runtime.stepping import LOGITS

        if self._stepper is None:
            raise RuntimeError("step() before prefill()")
        return self._stepper.feed(ids, np.ones_like(ids))[LOGITS]

    def forward(self, inputs: Inputs) -> Any:
        if self._routing is not None:
            return self._run_forced(inputs)
        return next(iter(self.session.run(inputs).values()))

    def force(self, routing: list[Routing] | None) -> None:
        self._routing = routing
        if routing is not None and self._forced is None:
            try:
                kind = _ForcedEngine if self.session.rank_use is None else _ForcedRanks
                self._forced = kind(self.session, self._threads)
            except BundleError as error:
                self._routing = None
                raise NotPossible(str(error)) from error

    def close(self) -> None:
        """Free the session, where there is one."""
        if self._session is not None:
            self._session.close()

    def _run_forced(self, inputs: Inputs) -> Any:
        assert self._forced is not None and self._routing is not None
        return self._forced.run(inputs, self._routing)

    def routing(self, inputs: Inputs) -> list[NDArray[np.int32]] | None:
        traced = self.session.run_traced({k: v for k, v in inputs.items() if k != "next_ids"})
        return [layer.expert_ids for layer in traced.layers]


class _ForcedEngine:
    """The bundle's model with the routing values as inputs. Unlike a traced run, it has no outputs but the
    model's and uses the default session options, so its times compare with the plain engine's."""

    def __init__(self, session: Session, threads: int | None) -> None:
        import onnx

        from ..backends.onnxruntime.runner import create_session
        from ..runtime.inputs import InputChecker
        from ..runtime.instrument import dtype_of, traced_model
        from ..runtime.plugin import runs_with_plugin

        manifest, bundle = session.manifest, session._bundle
        self._layers = manifest.moe_layers
        model = onnx.load_from_string(traced_model(bundle.model_path, self._layers, force_routing=True))
        wanted = {spec.name for spec in manifest.io.outputs}
        kept = [value for value in model.graph.output if value.name in wanted]
        del model.graph.output[:]
        model.graph.output.extend(kept)
        self._session = create_session(
            model.SerializeToString(),
            threads=threads,
            folder=bundle.model_path.parent,
            label="forced routing",
            plugin=runs_with_plugin(manifest),
        )
        self._dtypes = {value.name: dtype_of(value.type) for value in self._session.get_inputs()}
        vocabulary = manifest.text.vocab_size if manifest.text is not None else None
        self._checker = InputChecker(manifest.io, manifest.limits, vocabulary)
        self._outputs = [value.name for value in kept]

    def run(self, inputs: Inputs, routing: list[Routing]) -> Any:
        """The first output, with ``routing`` in place of what the routers choose."""
        import numpy as np

        from ..runtime.tensors import to_numpy, to_ort

        feeds = dict(self._checker.check(inputs).feeds)
        for layer, (ids, weights) in zip(self._layers, routing, strict=True):
            feeds[layer.expert_ids], feeds[layer.weights] = ids, weights
        binding = self._session.io_binding()
        for name, array in feeds.items():
            if name in self._dtypes:
                binding.bind_ortvalue_input(name, to_ort(np.ascontiguousarray(array, self._dtypes[name])))
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return to_numpy(binding.get_outputs()[0])


class _ForcedRanks:
    """The same on all ranks of an engine."""

    def __init__(self, session: Session, threads: int | None) -> None:
        self._session = session

    def run(self, inputs: Inputs, routing: list[Routing]) -> Any:
        """The first output, with ``routing`` in place of what the routers choose."""
        return next(iter(self._session.run_forced(inputs, routing).values()))
