"""Which plan a machine takes, and the one line where it takes none."""

from __future__ import annotations

import dataclasses

import pytest

from moe_export.backends.trt.choice import choose_engine
from moe_export.backends.trt.machine import GpuFound
from moe_export.errors import BundleError, EnvironmentLacksError
from moe_export.schema import EngineFile, Limits, Manifest, ModelIO, SourceInfo

SOURCE = SourceInfo("module", None, "", "M", "0" * 64)
LACKS = EnvironmentLacksError
GPU = GpuFound(89, (13, 0))


def manifest(*built: int) -> Manifest:
    engines = tuple(
        EngineFile(
            f"model.sm{sm}.plan", sm, "tensorrt_rtx", "1.7.1.116", "580", ("all",), 1, {"gemm": 1}, 1, 1, 1.0
        )
        for sm in built
    )
    return Manifest(
        SOURCE, "module", "tensorrt-rtx", "float32", 20, ModelIO((), ()), Limits(1, 1), (),
        sm=(80, 89), engines=engines, state="ready" if len(built) == 2 else "needs-gpu-build",
    )  # fmt: skip


def test_the_plan_of_the_gpus_sm_is_taken() -> None:
    assert choose_engine(manifest(80, 89), "b", GPU, "", "1.7.1.116").sm == 89
    assert choose_engine(manifest(80, 89), "b", GPU, "", "1.7.3").sm == 89, "the patch version may differ"


@pytest.mark.parametrize(
    ("gpu", "problem", "version", "kind", "message"),
    [
        (
            None,
            "",
            "1.7.1",
            EnvironmentLacksError,
            "SM80, SM89, and this machine has none; .* verify b --simulate",
        ),
        (
            GpuFound(120, (13, 0)),
            "",
            "1.7.1",
            EnvironmentLacksError,
            "the GPU here is SM120; build it again with --sm 1",
        ),
        (GpuFound(89, (12, 8)), "", "1.7.1", LACKS, "driver 580 or later; .* CUDA 12.8 only"),
        (GPU, "tensorrt_rtx is not installed: pip", None, LACKS, "is not installed: pip"),
        (GPU, "", "1.8.0", BundleError, "built by tensorrt_rtx 1.7.1.116, installed is 1.8.0"),
    ],
)
def test_what_does_not_fit_is_one_line(
    gpu: GpuFound | None, problem: str, version: str | None, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        choose_engine(manifest(80, 89), "b", gpu, problem, version)
    assert "\n" not in str(caught.value)


def test_a_plan_that_is_not_built_yet() -> None:
    with pytest.raises(BundleError, match=r"no plan for SM89 yet; .* python build_engine.py"):
        choose_engine(manifest(80), "b", GPU, "", "1.7.1.116")
    other = dataclasses.replace(manifest(80, 89), sm=(80,))
    with pytest.raises(EnvironmentLacksError, match="GPUs of SM80, and the GPU here is SM89"):
        choose_engine(other, "b", GPU, "", "1.7.1.116")
