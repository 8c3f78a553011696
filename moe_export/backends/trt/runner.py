"""A plan on a GPU: loads it, gives it memory for the shapes of a run, and runs it. *Not run on a GPU.*"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import BundleError, InputError
from moe_export.schema import EngineFile, ModelIO

from .build_engine import make_logger
from .device import DeviceArray, Stream
from .kernels import FOLDER as KERNELS
from .kernels import MODULE as PLUGIN_MODULE
from .nccl import Nccl, capsule


class PlanRunner:
    """One plan, one execution context, one stream. Runs of several threads follow each other."""

    def __init__(
        self,
        path: Path,
        engine: EngineFile,
        io: ModelIO,
        dtypes: Mapping[str, np.dtype[Any]],
        ranks: int = 1,
    ) -> None:
        """``dtypes``: of every input and output, as NumPy has them. ``ranks``: of the bundle; several must
        get a communicator before the first run.

        Raises:
            BundleError: TensorRT cannot read the plan.
        """
        trt: Any = importlib.import_module(engine.library)
        self.stream = Stream()
        self._ranks, self._rank = ranks, engine.rank
        self._nccl: Nccl | None = None
        self._communicator = 0
        kernels = path.parent / KERNELS
        if kernels.is_dir():
            importlib.import_module(PLUGIN_MODULE).register(trt, kernels)
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        # The plan comes from a bundle whose hashes were checked.
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BundleError(f"{path}: TensorRT cannot read the plan: {self._logger.last_words()}")
        self._context = self._engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._label = str(path)
        self._io = io
        self._dtypes = dict(dtypes)
        self._profiles = engine.profiles
        self._profile = -1
        self._memory: DeviceArray | None = None
        self._lock = threading.Lock()

    def set_communicator(self, nccl: Nccl, address: int) -> None:
        """Let the plan exchange with the other ranks' plans through an NCCL communicator. All ranks call it
        at once: it waits for them.

        Raises:
            BundleError: TensorRT refuses.
        """
        if not self._context.set_communicator(capsule(address)):
            raise BundleError(
                f"{self._label}: TensorRT refuses the NCCL communicator: {self._logger.last_words()}"
            )
        self._nccl, self._communicator = nccl, address

    def close(self) -> None:
        """Free this rank's end of the communicator, if it has one; the plan cannot run any more then."""
        with self._lock:
            nccl, self._nccl = self._nccl, None
            if nccl is not None:
                self._context = None
                nccl.free(self._communicator)

    def to_device(self, name: str, array: Any) -> DeviceArray:
        """An input's value on the GPU, in the dtype that the plan reads."""
        return self.stream.to_device(np.asarray(array, self._dtypes[name]))

    def to_host(self, array: DeviceArray) -> NDArray[Any]:
        """A copy in main memory."""
        return self.stream.to_host(array)

    def run(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """All outputs, on the GPU; they are complete when this returns.

        Raises:
            InputError: shapes that no profile of the plan has. BundleError: the run failed.
        """
        with self._lock:
            if self._ranks > 1 and self._nccl is None:
                # TensorRT would run it, and every rank would give its own part of the sums.
                raise BundleError(
                    f"{self._label} is of rank {self._rank} of {self._ranks}, which are not connected; start "
                    f"all: mpiexec -n {self._ranks} moe-export run BUNDLE"
                )
            self._choose_profile(inputs)
            context = self._context
            for name, array in inputs.items():
                if not context.set_input_shape(name, array.shape):
                    raise InputError(f"{self._label}: input {name!r} of shape {list(array.shape)} is refused")
                context.set_tensor_address(name, array.pointer)
            unknown = context.infer_shapes()
            if unknown:
                raise InputError(f"{self._label}: no shape for {', '.join(unknown)}")
            size = int(context.update_device_memory_size_for_shapes())
            if self._memory is None or self._memory.nbytes < size:
                self._memory = self.stream.empty((size,), np.dtype(np.uint8))
            context.set_device_memory(self._memory.pointer, self._memory.nbytes)
            outputs = {}
            for spec in self._io.outputs:
                shape = tuple(int(n) for n in context.get_tensor_shape(spec.name))
                outputs[spec.name] = self.stream.empty(shape, self._dtypes[spec.name])
                context.set_tensor_address(spec.name, outputs[spec.name].pointer)
            if not context.execute_async_v3(self.stream.handle):
                raise BundleError(f"{self._label}: the run failed: {self._logger.last_words()}")
            nccl = self._nccl
            self.stream.wait(None if nccl is None else lambda: nccl.problem(self._communicator))
            return outputs

    def _choose_profile(self, inputs: Mapping[str, DeviceArray]) -> None:
        """The first profile that covers the shapes: ``decode`` comes before ``prefill``."""
        for index in range(len(self._profiles)):
            if all(self._covered(name, array.shape, index) for name, array in inputs.items()):
                break
        else:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            known = ", ".join(self._profiles)
            raise InputError(f"{self._label}: no profile of the plan ({known}) covers {shapes}")
        if index != self._profile:
            if not self._context.set_optimization_profile_async(index, self.stream.handle):
                raise BundleError(f"{self._label}: profile {self._profiles[index]} cannot be chosen")
            self._profile = index

    def _covered(self, name: str, shape: tuple[int, ...], profile: int) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return len(low) == len(shape) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
