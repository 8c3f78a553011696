"""What stands in for the CUDA driver: launches run under Triton's interpreter, on addresses in this process.

It trusts nothing of the adapter but values: arguments are matched by position with the parameter names of the
kernel's own Triton function, read and written through their addresses.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from moe_export_plugins.gpu.bundle_kernels import KernelSpec
from moe_export_plugins.gpu.contract import CONTRACTS, Launch
from moe_export_plugins.gpu.driver import Device
from moe_export_plugins.gpu.interpret import run_interpreted
from moe_export_plugins.gpu.library import FORMAT, INDEX, KernelLibrary
from numpy.typing import NDArray

from moe_export.costs.tiles import Tile

TRITON_ORDER = {
    "dispatch": ("expert_ids", "M", "NB", "sorted_rows", "block_expert", "counts"),
    "gate_up": ("hidden", "up", "up_bias", "sorted_rows", "block_expert", "M", "inner"),
    "down": ("inner", "down", "down_bias", "weights", "sorted_rows", "block_expert", "M", "rows"),
    "combine": ("rows", "expert_ids", "T", "out"),
}
"""Parameters of the Triton functions; ``test_bundle_kernels`` compares them with compiled kernels."""


def numpy_type(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def stand_in_library(folder: Path, specs: Iterable[KernelSpec], sms: Sequence[int] = (89,)) -> KernelLibrary:
    """A folder of kernels whose machine code is their own description, for :class:`MemoryLauncher`."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, spec in enumerate({s.key: s for s in specs}.values()):
        text = json.dumps(
            {
                "kernel": spec.kernel,
                "dtype": spec.dtype,
                "constants": dict(spec.constants),
                "tile": spec.tile.to_dict(),
            }
        ).encode()
        name = f"{spec.kernel}_{number}"
        (folder / name).write_bytes(text)
        digest = hashlib.sha256(text).hexdigest()
        files = {"cubin": name, "ptx": name, "cubin_sha256": digest, "ptx_sha256": digest, "shared": 1024}
        entries.append(
            {
                **json.loads(text),
                "entry": name,
                "parameters": [k for _, k in CONTRACTS[spec.kernel].parameters(spec.constants)],
                "images": {str(sm): {**files, "cuda": 12090} for sm in sms},
            }
        )
    (folder / INDEX).write_text(json.dumps({"format": FORMAT, "kernels": entries}))
    return KernelLibrary.load(folder)


@dataclasses.dataclass
class MemoryLauncher:
    """A :class:`moe_export_plugins.gpu.driver.Launcher`. ``spoil`` gives down a wrong pointer."""

    sm: int = 89
    driver: int = 13000
    spoil: bool = False
    launched: list[str] = dataclasses.field(default_factory=list)
    loads: int = 0

    def device(self) -> Device:
        return Device(self.sm, self.driver, 99 * 1024, "GPU of the test", 1)

    def load(self, image: bytes, name: str, shared: int) -> Any:
        assert name.startswith(json.loads(image)["kernel"]) and shared == 1024
        self.loads += 1
        return json.loads(image)

    def launch(
        self, kernel: Any, launch: Launch, shared: int, stream: int, arguments: Sequence[tuple[int, bool]]
    ) -> None:
        name, constants, tile = kernel["kernel"], kernel["constants"], Tile(**kernel["tile"])
        rules = CONTRACTS[name]
        biased = bool(constants.get("biased"))
        names = [n for n in TRITON_ORDER[name] if biased or not n.endswith("_bias")]
        given = list(arguments)
        if self.spoil and name == "down":
            given[names.index("weights")] = given[names.index("inner")]
        assert len(names) == len(given), name
        named = dict(zip(names, given, strict=True))
        scalars = {s.name for s in rules.scalars}
        assert all(pointer == (n not in scalars) for n, (_, pointer) in named.items())
        # The number of tokens is what the scalars say: of tokens, or of assignments.
        tokens = named["T"][0] if "T" in named else named["M"][0] // constants["top_k"]
        expected = rules.launch(constants, tile, tokens)
        assert launch == expected and stream == 77
        assert tuple(named[s.name][0] for s in rules.scalars) == expected.scalars
        shapes = rules.input_shapes(constants, tile, tokens)
        arrays = {
            t.name: view(named[t.name][0], shapes[t.name], t.dtype_of(kernel["dtype"], constants)).copy()
            for t in rules.active_inputs(constants)
        }
        made = run_interpreted(name, arrays, constants, tile, dtype=kernel["dtype"])
        for t, shape in zip(rules.outputs, expected.output_shapes, strict=True):
            view(named[t.name][0], shape, t.dtype_of(kernel["dtype"], constants))[...] = made[t.name]
        self.launched.append(name)


def view(address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """The array at an address."""
    kind = numpy_type(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)
