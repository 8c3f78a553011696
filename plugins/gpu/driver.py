"""The few calls of the CUDA driver that launching compiled kernels takes, through ``cuda-bindings``.

*Not run on a GPU*: only the refusals were seen here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_export.errors import EnvironmentLacksError, MoeExportError

from .contract import Launch

STATIC_SHARED_LIMIT = 48 * 1024
"""Dynamic shared memory beyond this many bytes must be asked for, per kernel."""


@dataclass(frozen=True)
class Device:
    """The GPU of the current context.

    ``sm``: compute capability times ten; ``driver``: CUDA version of the driver as major * 1000 + minor * 10;
    ``shared_limit``: the most dynamic shared memory of one block in bytes.
    """

    sm: int
    driver: int
    shared_limit: int
    name: str
    context: int = 0
    """Address of the CUDA context: kernels are loaded into one."""


class Launcher(Protocol):
    """What runs a compiled kernel: the driver, or in tests Triton's interpreter."""

    def device(self) -> Device: ...

    def load(self, image: bytes, name: str, shared: int) -> Any:
        """A kernel ready to launch, from a cubin or PTX; ``shared`` bytes of dynamic shared memory."""

    def launch(
        self, kernel: Any, launch: Launch, shared: int, stream: int, arguments: Sequence[tuple[int, bool]]
    ) -> None:
        """Queue one launch; arguments as :meth:`Launch.arguments` gives them: integers are of 32 bits."""


class CudaDriver:
    """:class:`Launcher` on the real driver."""

    def __init__(self) -> None:
        """
        Raises:
            EnvironmentLacksError: ``cuda-bindings`` or the NVIDIA driver is missing, or there is no GPU.
        """
        try:
            from cuda.bindings import driver
        except ModuleNotFoundError as error:
            if error.name not in ("cuda", "cuda.bindings"):
                raise
            raise EnvironmentLacksError(
                "cuda-bindings is missing; it launches the GPU kernels: pip install 'moe-export[gpu]'"
            ) from None
        self._cuda = driver
        self._libraries: dict[bytes, Any] = {}
        self._devices: dict[int, Device] = {}
        try:
            self._call("cuInit", 0)
            found = self.count()
        except RuntimeError as error:
            # cuda-pathfinder's error for a missing libcuda is a RuntimeError of its own.
            raise EnvironmentLacksError(
                f"no NVIDIA driver on this machine, so GPU kernels cannot run: {error}"
            ) from None
        except CudaError as error:
            raise EnvironmentLacksError(f"no GPU that the NVIDIA driver can use: {error}") from None
        if not found:
            raise EnvironmentLacksError("the NVIDIA driver sees no GPU, so GPU kernels cannot run")

    def _call(self, name: str, *arguments: Any) -> Any:
        result = getattr(self._cuda, name)(*arguments)
        code, values = result[0], result[1:]
        if int(code) != 0:
            raise CudaError(f"CUDA driver: {name} failed with {code.name} ({int(code)})")
        return values[0] if len(values) == 1 else values

    def count(self) -> int:
        """GPUs that the driver sees."""
        return int(self._call("cuDeviceGetCount"))

    def open(self, index: int) -> int:
        """Make the primary context of GPU ``index`` current; the device's handle. TensorRT does this
        itself before it calls a plugin."""
        handle = self._call("cuDeviceGet", index)
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", handle))
        return int(handle)

    def device(self) -> Device:
        context = int(self._call("cuCtxGetCurrent"))
        if context not in self._devices:
            self._devices[context] = self._look(context)
        return self._devices[context]

    def _look(self, context: int) -> Device:
        handle = self._call("cuCtxGetDevice")
        wanted = self._cuda.CUdevice_attribute
        major, minor, shared = (
            int(self._call("cuDeviceGetAttribute", attribute, handle))
            for attribute in (
                wanted.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                wanted.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                wanted.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )
        )
        name = bytes(self._call("cuDeviceGetName", 96, handle)).split(b"\0")[0].decode(errors="replace")
        return Device(major * 10 + minor, int(self._call("cuDriverGetVersion")), shared, name, context)

    def load(self, image: bytes, name: str, shared: int) -> Any:
        if image not in self._libraries:
            none: tuple[Any, ...] = ()
            data = image if image[:4] == b"\x7fELF" else image + b"\0"
            self._libraries[image] = self._call("cuLibraryLoadData", data, none, none, 0, none, none, 0)
        kernel = self._call("cuLibraryGetKernel", self._libraries[image], name.encode())
        if shared > STATIC_SHARED_LIMIT:
            attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuKernelSetAttribute", attribute, shared, kernel, self._call("cuCtxGetDevice"))
        # A function of the current context: resolved here, since a stream that is being captured into a CUDA
        # graph allows no lazy loading.
        return self._call("cuKernelGetFunction", kernel)

    def launch(
        self, kernel: Any, launch: Launch, shared: int, stream: int, arguments: Sequence[tuple[int, bool]]
    ) -> None:
        values = tuple(v for v, _ in arguments)
        types = tuple(ctypes.c_void_p if pointer else ctypes.c_int32 for _, pointer in arguments)
        block = (launch.threads, 1, 1)
        self._call("cuLaunchKernel", kernel, *launch.grid, *block, shared, stream, (values, types), 0)


class CudaError(MoeExportError):
    """A call of the CUDA driver failed; names the call and its error code."""

    exit_code = 1
