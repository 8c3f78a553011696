"""Checks of ``tools/gpu_acceptance.py`` that launch kernels: arguments, shared memory, numbers.

*Not run on a GPU yet*: their logic was tested with stand-ins for it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from moe_export_plugins.gpu.contract import LIMITS
from numpy.typing import NDArray

from moe_export.costs.tiles import Tile, tiles
from moe_export.ops import OPS

Array = NDArray[Any]
Result = dict[str, Any]
POISON = 0xA5
SMALL: dict[str, Any] = {"num_experts": 11, "top_k": 3, "hidden": 72, "inner": 40}
"""Odd sizes, so that a swapped argument or an edge cannot pass."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return found
    return np.dtype(name)


class Gpu:
    """The first GPU: memory through the CUDA runtime, launches as the plugin does them."""

    def __init__(self) -> None:
        from moe_export_plugins.gpu.driver import CudaDriver

        from moe_export.backends.trt.device import Stream

        self.driver = CudaDriver()
        self.stream = Stream()
        self.stream.to_device(
            np.zeros(1, np.float32)
        )  # the runtime makes its context current at its first use
        self.device = self.driver.device()

    def launch(
        self, kernel: str, arrays: Mapping[str, Array], constants: Mapping[str, Any], tile: Tile, dtype: str
    ) -> dict[str, Array]:
        """One kernel, compiled for this GPU: its outputs.

        Raises:
            MoeExportError: it does not compile or the driver refuses it.
        """
        from moe_export_plugins.gpu.compile import compile_kernel
        from moe_export_plugins.gpu.contract import CONTRACTS

        rules = CONTRACTS[kernel]
        full = rules.complete(constants)
        made = compile_kernel(kernel, full, dtype, self.device.sm, tile)
        tokens = next(arrays[t.name].shape[0] for t in rules.active_inputs(full) if t.shape[0] == "T")
        launch = rules.launch(full, tile, tokens)
        held = {name: self.stream.to_device(a) for name, a in arrays.items()}
        for tensor, shape in zip(rules.outputs, launch.output_shapes, strict=True):
            kind = numpy_dtype(tensor.dtype_of(dtype, full))
            size = max(int(np.prod(shape)) * kind.itemsize, 16)
            poison = np.full(size, POISON, np.uint8).view(kind)
            held[tensor.name] = self.stream.to_device(poison)
        pointers = {name: array.pointer for name, array in held.items()}
        given = launch.arguments(rules.parameters(full), pointers)
        function = self.driver.load(made.cubin, made.entry, made.shared_bytes)
        self.driver.launch(function, launch, made.shared_bytes, self.stream.handle, given)
        self.stream.wait()
        out = {}
        for tensor, shape in zip(rules.outputs, launch.output_shapes, strict=True):
            count = int(np.prod(shape))
            out[tensor.name] = self.stream.to_host(held[tensor.name]).reshape(-1)[:count].reshape(shape)
        return out


def expert_inputs(shape: Any, tokens: int, seed: int = 0) -> dict[str, Array]:
    """Random inputs of ExpertMLP, by name; ids below 0 and past the last expert are among them."""
    rng = np.random.default_rng(seed)
    kind, e, h, i = numpy_dtype(shape.dtype), shape.num_experts, shape.hidden, shape.inner
    width = i * (2 if shape.gated else 1)
    return {
        "hidden": rng.standard_normal((tokens, h)).astype(kind),
        "expert_ids": rng.integers(-1, e + 1, (tokens, shape.top_k)).astype(np.int32),
        "weights": rng.random((tokens, shape.top_k)).astype(np.float32),
        "up": (rng.standard_normal((e, width, h)) / np.sqrt(h)).astype(kind),
        "down": (rng.standard_normal((e, h, i)) / np.sqrt(i)).astype(kind),
    }


def reference_error(out: Array, shape: Any, given: Mapping[str, Array]) -> float:
    """Largest error over max |float64 reference|; infinite where it is no number."""
    own = {a.name for a in OPS["ExpertMLP"].attributes}
    attributes = {k: v for k, v in shape.to_json().items() if k in own}
    wanted = OPS["ExpertMLP"].reference(**given, **attributes)
    difference = np.abs(out.astype(np.float64) - wanted).max(initial=0.0)
    scale = np.abs(wanted).max(initial=1e-30)
    return float(difference / scale) if np.isfinite(difference) else float("inf")


def marshalling() -> Result:
    """Every kernel on odd sizes, against the same kernel under Triton's interpreter."""
    from moe_export_plugins.gpu.contract import CONTRACTS
    from moe_export_plugins.gpu.interpret import run_interpreted

    gpu, worst = Gpu(), {}
    arrays = layer_arrays(7)
    for name, rules in CONTRACTS.items():
        known = {a.name for a in rules.constants}
        constants = rules.complete({k: v for k, v in SMALL.items() if k in known})
        tile = tiles(name, "float32")[0]
        given = {t.name: arrays[t.name] for t in rules.active_inputs(constants)}
        wanted = run_interpreted(name, given, constants, tile, dtype="float32")
        found = gpu.launch(name, given, constants, tile, "float32")
        worst[name] = max(difference(found[k], wanted[k]) for k in wanted)
        arrays |= wanted
    bad = {k: v for k, v in worst.items() if not v <= LIMITS["float32"]}
    return {
        "passed": not bad,
        "reason": f"off from the interpreter: {bad}" if bad else "",
        "max_error": worst,
    }


def layer_arrays(tokens: int) -> dict[str, Array]:
    """Inputs of the kernels of one float32 layer; outputs of earlier kernels are added as they come."""
    from moe_export_plugins.gpu.experts import ExpertShape

    made = expert_inputs(ExpertShape("float32", **SMALL), tokens)
    made["logits"] = (
        np.random.default_rng(1).standard_normal((tokens, SMALL["num_experts"])).astype(np.float32)
    )
    return made


def difference(found: Array, wanted: Array) -> float:
    """Integers must be equal; numbers that the interpreter left unwritten do not count."""
    if wanted.dtype.kind in "iu":
        return 0.0 if np.array_equal(found, wanted) else float("inf")
    written = ~np.isnan(wanted.astype(np.float64))
    error = np.abs(found.astype(np.float64) - wanted.astype(np.float64))[written]
    scale = np.abs(wanted.astype(np.float64)[written]).max(initial=1e-30)
    worst = float(error.max(initial=0.0) / scale)
    return worst if np.isfinite(worst) else float("inf")


def shared_memory() -> Result:
    """A product whose pipeline takes more than 48 KiB: the driver must grant it, the numbers must hold."""
    from moe_export_plugins.gpu.compile import compile_kernel
    from moe_export_plugins.gpu.contract import CONTRACTS
    from moe_export_plugins.gpu.driver import STATIC_SHARED_LIMIT
    from moe_export_plugins.gpu.interpret import run_interpreted

    gpu = Gpu()
    rules = CONTRACTS["gate_up"]
    known = {a.name for a in rules.constants}
    constants = rules.complete({k: v for k, v in SMALL.items() if k in known})
    for stages in (4, 5, 6):
        tile = Tile(64, 64, 64, group=1, warps=8, stages=stages)
        size = compile_kernel("gate_up", constants, "float16", gpu.device.sm, tile).shared_bytes
        if STATIC_SHARED_LIMIT < size <= gpu.device.shared_limit:
            break
    else:
        return {"passed": False, "reason": f"no tile between 48 KiB and {gpu.device.shared_limit} bytes"}
    arrays = {k: v.astype(np.float16) if k in ("hidden", "up") else v for k, v in layer_arrays(70).items()}
    dispatched = run_interpreted(
        "dispatch", {"expert_ids": arrays["expert_ids"]}, {k: SMALL[k] for k in ("num_experts", "top_k")},
        Tile(64, 1024),
    )  # fmt: skip
    given = {
        **{k: arrays[k] for k in ("hidden", "up")},
        **{k: dispatched[k] for k in ("sorted_rows", "block_expert")},
    }
    wanted = run_interpreted("gate_up", given, constants, tile, dtype="float16")["inner"]
    error = difference(gpu.launch("gate_up", given, constants, tile, "float16")["inner"], wanted)
    passed = error <= LIMITS["float16"]
    reason = "" if passed else f"off by {error:.3g} with {size} bytes"
    return {"passed": passed, "reason": reason, "bytes": size, "max_error": error}


def tensor_cores(
    base: Any = None, token_counts: tuple[int, ...] = (1, 300), dtypes: tuple[str, ...] = tuple(LIMITS)
) -> Result:
    """Whole layers on tensor cores, every set of tiles and dtype, as the plugin launches them. ``base``: the
    layer; by default one of a usual size."""
    from moe_export_plugins.gpu.bundle_kernels import expert_specs, write_kernels
    from moe_export_plugins.gpu.experts import ExpertShape, plan, scratch_bytes, tile_sets
    from moe_export_plugins.gpu.launching import Kernels, run
    from moe_export_plugins.gpu.library import KernelLibrary

    gpu, worst, speed = Gpu(), {}, {}
    base = base or ExpertShape("float16", num_experts=16, top_k=4, hidden=1024, inner=704)
    with tempfile.TemporaryDirectory() as name:
        for dtype in dtypes:
            shape = replace(base, dtype=dtype)
            folder = Path(name) / dtype
            write_kernels(folder, expert_specs(shape), [gpu.device.sm])
            kernels = Kernels(KernelLibrary.load(folder), gpu.driver)
            for tokens in token_counts:
                given = expert_inputs(shape, tokens)
                held = {k: gpu.stream.to_device(v) for k, v in given.items()}
                out = gpu.stream.empty(given["hidden"].shape, given["hidden"].dtype)
                space = gpu.stream.empty((max(scratch_bytes(shape, tokens), 256),), np.dtype(np.uint8))
                pointers = {k: v.pointer for k, v in held.items()} | {"out": out.pointer}
                for chosen in tile_sets(dtype):
                    case = f"{dtype}, {tokens} tokens, {chosen.gate_up}"
                    assert plan(shape, chosen, tokens).scratch_bytes <= space.nbytes
                    started = time.perf_counter()
                    for _ in range(2):
                        # The second run counts: the first loads kernels.
                        started = time.perf_counter()
                        run(kernels, shape, chosen, tokens, pointers, space.pointer, gpu.stream.handle)
                        gpu.stream.wait()
                    speed[case] = round(1e3 * (time.perf_counter() - started), 3)
                    error = reference_error(gpu.stream.to_host(out), shape, given)
                    worst[case] = error
    bad = {k: v for k, v in worst.items() if not v <= LIMITS[k.split(",")[0]]}
    return {
        "passed": not bad,
        "reason": f"outside the limits {LIMITS}: {bad}" if bad else "",
        "max_error": {d: max(v for k, v in worst.items() if k.startswith(d)) for d in dtypes},
        "milliseconds": speed,
    }
