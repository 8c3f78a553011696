"""The compiled kernels of a bundle: a folder of cubin and PTX files, and ``kernels.json`` that says what they
are.

The file lists each kernel once (constants, dtype, tile, parameters), and per SM its files with their hashes,
dynamic shared memory and the CUDA version their driver must know. Nothing in it is code; hashes are checked
before anything is given to a driver.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_export.costs.tiles import Tile
from moe_export.errors import BundleError, EnvironmentLacksError

from .aot import Image
from .driver import Device

INDEX = "kernels.json"
FORMAT = 1


@dataclass(frozen=True)
class Cubin:
    """A kernel for one SM, ready for the driver."""

    code: bytes
    entry: str
    shared: int


def kernel_key(kernel: str, dtype: str, constants: Mapping[str, Any], tile: Tile) -> str:
    """What tells kernels apart, as text. Floats count as float32, which ONNX attributes are; dispatch has no
    dtype, since it computes with integers only; without a bias there is no dtype of it."""
    import numpy as np

    plain = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in constants.items()}
    if not plain.get("biased"):
        plain.pop("bias_dtype", None)
    return json.dumps([kernel, "" if kernel == "dispatch" else dtype, plain, tile.to_dict()], sort_keys=True)


def sm_of_file(sms: Sequence[int], device: int) -> int | None:
    """The SM among ``sms`` whose cubin a device runs: its own, or the nearest lower one of its generation.
    From SM90 on kernels use features of their SM alone."""
    if device in sms:
        return device
    fitting = [s for s in sms if s // 10 == device // 10 and s < device and s < 90]
    return max(fitting, default=None)


class KernelLibrary:
    """A loaded and checked ``kernels.json``; files are read, and their hashes compared, when asked for."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder = folder
        self._entries: dict[str, Mapping[str, Any]] = {}
        for number, entry in enumerate(index["kernels"]):
            where = f"{folder / INDEX}: kernels[{number}]"
            try:
                tile = Tile(**entry["tile"])
                key = kernel_key(entry["kernel"], entry["dtype"], entry["constants"], tile)
                for files in entry["images"].values():
                    for name in ("cubin", "ptx", "cubin_sha256", "ptx_sha256", "shared", "cuda"):
                        files[name]
                entry["entry"], entry["parameters"]
            except (KeyError, TypeError, AttributeError) as error:
                raise BundleError(f"{where}: {error} is missing or wrong; build the bundle again") from None
            self._entries[key] = entry
        images = [e["images"] for e in self._entries.values()]
        self.sms = tuple(sorted(set.intersection(*(set(map(int, i)) for i in images)))) if images else ()

    @classmethod
    def load(cls, folder: Path) -> KernelLibrary:
        """
        Raises:
            BundleError: the folder holds no readable ``kernels.json``, or one of a newer format.
        """
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{path} is missing: the bundle has no compiled kernels") from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read ({error}); build the bundle again") from None
        if not isinstance(index, dict) or not isinstance(index.get("kernels"), list):
            raise BundleError(f"{path}: expected an object with a list 'kernels'")
        if index.get("format") != FORMAT:
            raise BundleError(
                f"{path}: format {index.get('format')!r}, expected {FORMAT}; build the bundle again"
            )
        return cls(folder, index)

    def check(self, device: Device) -> None:
        """Refuse a GPU or driver that the kernels do not run on.

        Raises:
            BundleError: no kernel is for this SM.
            EnvironmentLacksError: the driver is too old.
        """
        sm = sm_of_file(self.sms, device.sm)
        if sm is None:
            listed = ", ".join(f"SM{s}" for s in self.sms) or "no SM"
            raise BundleError(
                f"compiled kernels are for {listed}; this GPU ({device.name}) is SM{device.sm}: build with "
                f"--sm {device.sm}"
            )
        needed = max(int(e["images"][str(sm)]["cuda"]) for e in self._entries.values())
        # A driver runs every cubin of its own major CUDA version.
        if device.driver // 1000 < needed // 1000:
            raise EnvironmentLacksError(
                f"compiled kernels need a driver for CUDA {needed // 1000}; this one is for CUDA "
                f"{device.driver // 1000}.{device.driver % 1000 // 10}: update the NVIDIA driver"
            )

    def cubin(
        self, kernel: str, dtype: str, constants: Mapping[str, Any], tile: Tile, device_sm: int
    ) -> Cubin:
        """The machine code for a GPU.

        Raises:
            BundleError: it is not in the library, or its file is damaged.
        """
        entry = self._find(kernel, dtype, constants, tile)
        sm = sm_of_file([int(s) for s in entry["images"]], device_sm)
        if sm is None:
            raise BundleError(f"kernel {entry['entry']}: not compiled for SM{device_sm}")
        files = entry["images"][str(sm)]
        code = self._read(files["cubin"], files["cubin_sha256"])
        return Cubin(code, entry["entry"], int(files["shared"]))

    def ptx(self, kernel: str, dtype: str, constants: Mapping[str, Any], tile: Tile, sm: int) -> Image:
        """The PTX for an SM; raises BundleError as :meth:`cubin` does."""
        entry = self._find(kernel, dtype, constants, tile)
        found = sm_of_file([int(s) for s in entry["images"]], sm)
        if found is None:
            raise BundleError(f"kernel {entry['entry']}: not compiled for SM{sm}")
        files = entry["images"][str(found)]
        text = self._read(files["ptx"], files["ptx_sha256"]).decode()
        return Image(entry["entry"], text, int(files["shared"]), tuple(entry["parameters"]))

    def _find(self, kernel: str, dtype: str, constants: Mapping[str, Any], tile: Tile) -> Mapping[str, Any]:
        key = kernel_key(kernel, dtype, constants, tile)
        if key not in self._entries:
            held = sorted({f"{e['kernel']} {e['dtype']} {Tile(**e['tile'])}" for e in self._entries.values()})
            raise BundleError(
                f"{self.folder / INDEX}: no kernel {kernel} {dtype} {tile} for {dict(constants)}; it holds "
                f"{len(self._entries)}: {'; '.join(held[:6])}"
            )
        return self._entries[key]

    def _read(self, name: str, expected: str) -> bytes:
        path = self.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"{self.folder / INDEX}: the file name {name!r} leaves the folder")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error}); build the bundle again") from None
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise BundleError(f"{path} is damaged: SHA-256 {found[:12]}…, expected {expected[:12]}…")
        return data


@dataclass(frozen=True)
class PtxOf:
    """A library as the source of PTX for one SM (see :class:`moe_export_plugins.gpu.aot.KernelSource`)."""

    library: KernelLibrary
    sm: int

    def ptx(self, kernel: str, dtype: str, constants: Mapping[str, Any], tile: Tile) -> Image:
        return self.library.ptx(kernel, dtype, constants, tile, self.sm)
