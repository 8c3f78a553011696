"""Which plan of a bundle runs on this machine, or in one line why none does."""

from __future__ import annotations

from moe_export.bundle.tools import major_minor
from moe_export.errors import BundleError, EnvironmentLacksError
from moe_export.schema import EngineFile, Manifest

from .library import INSTALL, MODULES, library_problem, library_version
from .machine import CUDA, GpuFound, find_gpu


def usable_engine(manifest: Manifest, label: str) -> EngineFile:
    """The plan for the GPU here.

    Raises:
        EnvironmentLacksError: no GPU, another SM, too old a driver, no library.
        BundleError: the bundle holds no plan yet, or one of another version of the library.
    """
    return choose_engine(
        manifest, label, find_gpu(), library_problem(manifest.target), library_version(manifest.target)
    )


def choose_engine(
    manifest: Manifest, label: str, gpu: GpuFound | None, problem: str, version: str | None
) -> EngineFile:
    """:func:`usable_engine` for a machine with this GPU and this version of the library (``problem``: why the
    library cannot be used; empty: it can)."""
    plans = ", ".join(f"SM{n}" for n in manifest.sm)
    if gpu is None:
        raise EnvironmentLacksError(
            f"{label} is for NVIDIA GPUs of {plans}, and this machine has none; `moe-export verify {label} "
            "--simulate` "
            "runs the same graph on the CPU"
        )
    if gpu.sm not in manifest.sm:
        raise EnvironmentLacksError(
            f"{label} is for GPUs of {plans}, and the GPU here is SM{gpu.sm}; build it again with --sm "
            f"{gpu.sm}"
        )
    engine = next((e for e in manifest.engines if e.sm == gpu.sm), None)
    if engine is None:
        raise BundleError(
            f"{label} holds no plan for SM{gpu.sm} yet; finish it here: python build_engine.py in its "
            "folder (needs "
            f"`{INSTALL[manifest.target]}`)"
        )
    if gpu.cuda < CUDA:
        raise EnvironmentLacksError(
            f"{label} needs NVIDIA driver {engine.driver} or later; the driver here supports CUDA "
            f"{gpu.cuda[0]}."
            f"{gpu.cuda[1]} only; upgrade the driver"
        )
    if problem:
        raise EnvironmentLacksError(f"{label}: {problem}")
    if major_minor(version or "") != major_minor(engine.version):
        raise BundleError(
            f"{label} was built by {engine.library} {engine.version}, installed is {version}, and plans "
            "are read by "
            f"their own version only; install it with `pip install '{MODULES[manifest.target]}-cu13=="
            f"{engine.version}'`, or build the bundle again"
        )
    return engine
