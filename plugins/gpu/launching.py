"""Runs one layer's experts on a GPU: loads the compiled kernels once, and queues their launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_export.errors import BundleError, EnvironmentLacksError, MoeExportError

from .driver import CudaDriver, Device, Launcher
from .experts import STEPS, ExpertShape, TileSet, arguments, choose_tiles, plan
from .library import KernelLibrary


class Kernels:
    """Loaded kernels, shared by a creator's plugins."""

    def __init__(self, library: KernelLibrary | None, launcher: Launcher | None) -> None:
        self._libraries = [library] if library is not None else []
        self._launcher = launcher
        self._loaded: dict[tuple[int, ExpertShape, TileSet], tuple[tuple[Any, int], ...]] = {}

    def add(self, library: KernelLibrary | None, launcher: Launcher | None) -> None:
        """Another bundle's kernels, beside those before: engines of several bundles live in one process."""
        if library is not None:
            self._libraries.insert(0, library)
        self._launcher = launcher or self._launcher

    def load(self, shape: ExpertShape, chosen: TileSet) -> tuple[Launcher, tuple[tuple[Any, int], ...]]:
        """The launcher, and handle and shared memory of each step's kernel on the current GPU.

        Raises:
            BundleError: there are no kernels for it.
            EnvironmentLacksError: no driver, or one too old.
        """
        launcher = self._driver()
        device = launcher.device()
        key = (device.context, shape, chosen)
        if key not in self._loaded:
            self._loaded[key] = self._load(launcher, device, shape, chosen)
        return launcher, self._loaded[key]

    def choose(self, shape: ExpertShape, tokens: int) -> TileSet:
        """Tiles for a number of tokens on the current GPU.

        Raises:
            EnvironmentLacksError: no driver.
        """
        return choose_tiles(shape, tokens, self._driver().device().sm)

    def _driver(self) -> Launcher:
        if self._launcher is None:
            self._launcher = CudaDriver()
        return self._launcher

    def _load(
        self, launcher: Launcher, device: Device, shape: ExpertShape, chosen: TileSet
    ) -> tuple[tuple[Any, int], ...]:
        if not self._libraries:
            raise BundleError(
                "plugin ExpertMLP: no compiled kernels; give the bundle's folder of kernels to "
                "moe_export_plugins.gpu.ipluginv3.register before loading the engine"
            )
        problems: list[MoeExportError] = []
        for library in self._libraries:
            try:
                return _load_from(library, launcher, device, shape, chosen)
            except (BundleError, EnvironmentLacksError) as error:
                problems.append(error)
        raise problems[0]


def _load_from(
    library: KernelLibrary, launcher: Launcher, device: Device, shape: ExpertShape, chosen: TileSet
) -> tuple[tuple[Any, int], ...]:
    library.check(device)
    out = []
    for name in STEPS:
        image = library.cubin(name, shape.dtype, shape.constants(name), chosen.of(name), device.sm)
        if image.shared > device.shared_limit:
            raise BundleError(
                f"kernel {image.entry} takes {image.shared} bytes of shared memory; {device.name} has "
                f"{device.shared_limit} for a block"
            )
        out.append((launcher.load(image.code, image.entry, image.shared), image.shared))
    return tuple(out)


def run(
    kernels: Kernels,
    shape: ExpertShape,
    chosen: TileSet,
    tokens: int,
    pointers: Mapping[str, int],
    workspace: int,
    stream: int,
) -> None:
    """Queue the four launches. ``pointers``: addresses by tensor name; scratch lies in ``workspace``."""
    if tokens == 0:
        return
    launcher, loaded = kernels.load(shape, chosen)
    planned = plan(shape, chosen, tokens)
    every = {**pointers, **{name: workspace + offset for name, offset in planned.offsets.items()}}
    for (name, launch), (kernel, shared) in zip(planned.launches, loaded, strict=True):
        given = arguments(shape, name, launch, every)
        launcher.launch(kernel, launch, shared, stream, given)
